"""Log-probabilities beside those of the generated tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

# A token id and its log-probability.
TokenScore = tuple[int, float]
# The most likely tokens at one place, best first.
TopTokens = Sequence[TokenScore]


@dataclass(frozen=True, slots=True)
class PromptScore:
    """What the model made of one prompt token, given those before it."""

    logprob: float
    top_tokens: TopTokens


# Of each prompt token; the first one has none, and neither have those that are not computed yet.
PromptScores = list[PromptScore | None]
