"""From what a client asked for to a ValidRequest: the one place where ranges and limits are checked.

Dialects only read types (api/fields.py). A parameter that is known but not honoured is refused by name.
"""

from typing import Protocol

from text_generation_router.config import RouterConfig
from text_generation_router.errors import ValidationError
from text_generation_router.generation_options import GenerationOptions
from text_generation_router.grammar import Grammar
from text_generation_router.ranges import request_ranges
from text_generation_router.sampling import is_sampled, sampling_parameters
from text_generation_router.schema_checks import RefusedGrammar
from text_generation_router.valid_request import ValidRequest

# Requests without a limit are planned in pieces of this many new tokens: all that must surely fit.
MAX_NEW_TOKENS_CHUNK = 1024
MAX_STOP_STRING_CHARACTERS = 1024
# Far more than anyone needs; the shard has room for twice as many, the end-of-text tokens among them.
MAX_LOGIT_BIASES = 512
MAX_LOGIT_BIAS = 100.0
MAX_STOP_TOKEN_IDS = 64
# Messages call these by their /generate names on every route: clients match on the texts.
_FIXED_NAMES = ("inputs", "max_new_tokens")


class Limits(Protocol):
    """What model and memory allow, known after warm-up."""

    @property
    def max_input_tokens(self) -> int:
        """Longest prompt."""

    @property
    def max_total_tokens(self) -> int:
        """Longest sequence, prompt and generated tokens together."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def device_name(self) -> str:
        """What computes: "cpu", or the GPU's name."""


class PromptEncoder(Protocol):
    """What validation needs of the tokenizer."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """What ends a text."""

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, computed off the event loop."""


class GrammarCompiler(Protocol):
    """What validation needs of grammars."""

    async def compile(self, grammar: Grammar) -> str:
        """The canonical text, with the shard ready for it; raises RefusedGrammar and Overloaded."""


class Validator:
    """Checks options against the server's limits and encodes prompts."""

    def __init__(
        self,
        config: RouterConfig,
        limits: Limits,
        encoder: PromptEncoder,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        """`grammars`: None where no grammar can be followed."""
        self._config = config
        self._grammars = grammars
        self._limits = limits
        self._encoder = encoder
        self._ranges = request_ranges(config, limits)

    async def validate(
        self,
        prompt: str | list[int],
        options: GenerationOptions,
        add_special_tokens: bool = True,
        tenant: str = "",
    ) -> ValidRequest:
        """Build the request for one prompt, text or token ids; raises ValidationError.

        Tenants share no prefix-cache blocks.
        """
        self.check_options(options)
        if not prompt:
            raise self._error(options, "inputs", "cannot be empty")
        if isinstance(prompt, str):
            token_ids = await self._encoder.encode(prompt, add_special_tokens)
            if not token_ids:
                raise self._error(options, "inputs", "has no tokens")
        else:
            token_ids = prompt
            self._check_token_ids(token_ids, options)
        if options.truncate is not None:
            token_ids = token_ids[-options.truncate :]
        max_new_tokens = self._fit(len(token_ids), options)
        return ValidRequest(
            token_ids=token_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling_parameters(options, self._limits.vocab_size, self._encoder.eos_token_ids, max_new_tokens),
            stop_strings=options.stop,
            keep_stop_string=options.keep_stop_string,
            ignore_eos=options.ignore_eos,
            stop_token_ids=frozenset(options.stop_token_ids),
            scores_prompt=self._scores_prompt(options),
            prompt_top_n_tokens=(options.top_n_tokens or 0) if options.scores_prompt else 0,
            grammar=await self._compile(options),
            tenant=tenant,
            priority=options.priority or 0,
            cache_salt=tenant.encode(),
            shown_special_ids=options.shown_special_ids,
        )

    def check_options(self, options: GenerationOptions) -> None:
        """Check everything that does not depend on the prompt; raises ValidationError."""
        self._check_ranges(options)
        self._check_stops(options)
        self._check_named_tokens(options)
        self._check_runs(options)
        self._check_grammar(options)
        self._refuse_unsupported(options)

    def _error(self, options: GenerationOptions, field_name: str, reason: str) -> ValidationError:
        param = options.client_name(field_name)
        return ValidationError(f"`{field_name if field_name in _FIXED_NAMES else param}` {reason}", param=param)

    def _check_ranges(self, options: GenerationOptions) -> None:
        for name, allowed in self._ranges.items():
            value = getattr(options, name)
            if value is not None and (reason := allowed.refusal(value)) is not None:
                raise self._error(options, name, reason)
        if options.min_tokens and options.max_new_tokens is not None and options.min_tokens > options.max_new_tokens:
            raise self._error(options, "min_tokens", f"must be <= `{options.client_name('max_new_tokens')}`")
        if options.is_stream and options.prefill_details:
            raise self._error(options, "decoder_input_details", "is not available in a stream")

    def _check_stops(self, options: GenerationOptions) -> None:
        most = self._config.max_stop_sequences
        if len(options.stop) > most:
            raise self._error(options, "stop", f"takes at most {most} stop strings. Given: {len(options.stop)}")
        if any(not 1 <= len(text) <= MAX_STOP_STRING_CHARACTERS for text in options.stop):
            raise self._error(options, "stop", f"strings must have 1 to {MAX_STOP_STRING_CHARACTERS} characters")

    def _check_named_tokens(self, options: GenerationOptions) -> None:
        """Ids against the logits' width: the tokenizer may know more or fewer."""
        biases, vocab_size = options.logit_bias, self._limits.vocab_size
        for name, token_ids, most in (
            ("logit_bias", list(biases), MAX_LOGIT_BIASES),
            ("stop_token_ids", list(options.stop_token_ids), MAX_STOP_TOKEN_IDS),
        ):
            if len(token_ids) > most:
                raise self._error(options, name, f"may name at most {most} tokens. Given: {len(token_ids)}")
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
                raise self._error(options, name, f"must hold token ids >= 0 and < {vocab_size}")
        if any(abs(bias) > MAX_LOGIT_BIAS for bias in biases.values()):
            raise self._error(options, "logit_bias", f"values must be >= -{MAX_LOGIT_BIAS} and <= {MAX_LOGIT_BIAS}")

    def _check_runs(self, options: GenerationOptions) -> None:
        if options.best_of is None or options.num_runs == options.num_answers:
            if options.best_of is not None and options.best_of < options.num_answers:
                raise self._error(options, "best_of", "must be >= `n`")
            return
        if options.is_stream:
            raise self._error(options, "best_of", "!= 1 is not supported when streaming tokens")
        if not is_sampled(options):
            raise self._error(options, "best_of", "> 1 needs sampling")
        if options.seed is not None and not options.may_seed_runs:
            raise self._error(options, "seed", "must not be set when `best_of` > 1")

    def _check_grammar(self, options: GenerationOptions) -> None:
        if options.grammar is None:
            return
        if self._config.disable_grammar_support:
            reason = "needs grammars, which are switched off by --disable-grammar-support"
        elif self._grammars is None:
            reason = "needs grammars, and what bytes this model's tokens stand for is not known"
        elif options.ignore_eos or options.min_tokens:
            other = "ignore_eos" if options.ignore_eos else "min_tokens"
            reason = f"and `{other}` exclude each other: the text ends where its grammar does"
        else:
            return
        raise self._error(options, "grammar", reason)

    async def _compile(self, options: GenerationOptions) -> str:
        if options.grammar is None:
            return ""
        assert self._grammars is not None, "checked"
        try:
            return await self._grammars.compile(options.grammar)
        except RefusedGrammar as refusal:
            raise self._error(options, "grammar", f"cannot be used: it {refusal}") from None

    def _refuse_unsupported(self, options: GenerationOptions) -> None:
        # The dialect has given its own names for these.
        for param in options.unsupported:
            raise ValidationError(f"`{param}` is not supported by this server", param=param)

    def _scores_prompt(self, options: GenerationOptions) -> bool:
        return options.scores_prompt or (options.prefill_details and self._config.enable_prefill_logprobs)

    def _check_token_ids(self, token_ids: list[int], options: GenerationOptions) -> None:
        vocab_size = self._limits.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise self._error(options, "inputs", f"must hold token ids >= 0 and < {vocab_size}")

    def _fit(self, num_input_tokens: int, options: GenerationOptions) -> int:
        """How many new tokens the request may have: the total is checked before the input, as clients expect."""
        max_total, max_input = self._limits.max_total_tokens, self._limits.max_input_tokens
        room = max(max_total - num_input_tokens, 0)
        wanted = options.max_new_tokens if options.max_new_tokens is not None else room
        if num_input_tokens + min(wanted, MAX_NEW_TOKENS_CHUNK) > max_total:
            at_fault = "max_new_tokens" if num_input_tokens <= max_input else "inputs"
            raise ValidationError(
                f"`inputs` tokens + `max_new_tokens` must be <= {max_total}. "
                f"Given: {num_input_tokens} `inputs` tokens and {wanted} `max_new_tokens`",
                param=options.client_name(at_fault),
            )
        if num_input_tokens > max_input:
            raise self._error(options, "inputs", f"must have at most {max_input} tokens. Given: {num_input_tokens}")
        return min(wanted, room)
