"""ValidRequest: what every route must build before anything is queued. The rest of the router trusts it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LogitsChanges:
    """What is done to the logits before a token is chosen, greedily or not; in this order."""

    bias_token_ids: tuple[int, ...] = ()  # each below the logits' width
    bias_values: tuple[float, ...] = ()  # added to their logits
    has_watermark: bool = False
    repetition_penalty: float = 1.0  # over prompt and generated tokens; 1: off
    share_penalty: float = 0.0  # times a token's share of prompt and generated tokens
    frequency_penalty: float = 0.0  # for each time that a token was generated
    presence_penalty: float = 0.0  # once for a token that was generated
    banned_token_ids: tuple[int, ...] = ()  # never chosen among the first `min_tokens` generated tokens
    min_tokens: int = 0


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are chosen. Temperature 0 is greedy; the other filters are then without effect."""

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    typical_p: float = 1.0  # 1: off
    seed: int = 0  # [0, 2**64)
    changes: LogitsChanges | None = None  # None: tokens are chosen from the logits as they are
    top_n_tokens: int = 0  # told beside each chosen token


@dataclass(frozen=True)
class ValidRequest:
    """One prompt to extend, every field within the server's limits."""

    token_ids: list[int]  # never empty, each below the logits' width
    max_new_tokens: int  # at least 1; prompt and new tokens together fit max_total_tokens
    sampling: SamplingParameters = SamplingParameters()
    stop_strings: tuple[str, ...] = ()
    # TGI's routes keep the stop string that ended a text, OpenAI's cut it off.
    keep_stop_string: bool = True
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()  # end the text beside the model's own
    scores_prompt: bool = False  # the log-probabilities of the prompt's tokens are wanted
    prompt_top_n_tokens: int = 0  # and so many most likely tokens beside each
    grammar: str = ""  # canonical text that the generated tokens must follow; "": none
    tenant: str = ""  # whose key it carries; tenants take turns
    priority: int = 0  # among the waiting requests of its tenant the lowest goes first
    # Requests share prefix-cache blocks only with requests of the same salt.
    cache_salt: bytes = b""
    # Special tokens whose own text is part of the text, for whoever parses it.
    shown_special_ids: frozenset[int] = frozenset()
