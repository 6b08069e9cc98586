"""What a client asked for beside the prompt, in one form for every dialect; validation.py checks it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from text_generation_router.grammar import Grammar

# Shown by number or kind, or no business of the log's.
_NOT_LOGGED = ("names", "may_seed_runs", "stop", "shown_special_ids", "grammar", "logit_bias")


@dataclass(frozen=True)
class GenerationOptions:
    """What a client asked for beside the prompt, in one form for every dialect. None: not given."""

    max_new_tokens: int | None = None
    do_sample: bool = False
    is_greedy: bool = False  # wins over everything that switches sampling on
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    keep_stop_string: bool = True
    ignore_eos: bool = False
    truncate: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    share_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> what is added to its logit
    min_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    best_of: int | None = None
    n: int | None = None
    may_seed_runs: bool = True  # whether `best_of` may have a seed
    top_n_tokens: int | None = None
    watermark: bool = False
    is_stream: bool = False
    prefill_details: bool = False
    scores_prompt: bool = False
    grammar: Grammar | None = None
    user: str | None = None  # for the log alone
    priority: int | None = None
    # Special tokens whose own text is part of the answer's text.
    shown_special_ids: frozenset[int] = frozenset()
    # Names of other given parameters that this server does not honour.
    unsupported: tuple[str, ...] = ()
    # Field names of the dialect where they differ from the ones above.
    names: dict[str, str] = field(default_factory=dict)

    def client_name(self, field_name: str) -> str:
        """What the client calls a field."""
        return self.names.get(field_name, field_name)

    @property
    def num_answers(self) -> int:
        """How many answers to one prompt are wanted."""
        return self.n or 1

    @property
    def num_runs(self) -> int:
        """How many runs of one prompt those are chosen from."""
        return max(self.best_of or 1, self.num_answers)

    def given(self) -> dict[str, Any]:
        """Options that differ from the defaults, for the log; of what is a client's text only number or kind."""
        shown: dict[str, Any] = {}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in _NOT_LOGGED and value != option.default:
                shown[option.name] = value
        if self.stop:
            shown["num_stop_strings"] = len(self.stop)
        if self.logit_bias:
            shown["num_logit_biases"] = len(self.logit_bias)
        if self.grammar is not None:
            shown["grammar"] = self.grammar.kind
        return shown
