"""Log-probabilities beside those of the generated tokens."""

from dataclasses import dataclass

# A token id and its log-probability.
TokenScore = tuple[int, float]


@dataclass(frozen=True, slots=True)
class PromptScore:
    """What the model made of one prompt token, given those before it."""

    logprob: float
    top_tokens: list[TokenScore]  # the most likely ones at its place, best first


# Of each prompt token; the first one has none, and neither have those that are not computed yet.
PromptScores = list[PromptScore | None]
