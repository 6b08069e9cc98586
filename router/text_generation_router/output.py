"""Turns a sequence's token ids into the text its client sees, and finds the stop strings in it."""

from text_generation_router.detokenizer import Detokenizer
from text_generation_router.errors import RouterError
from text_generation_router.sequence import Sequence
from text_generation_router.stop_strings import StopStrings
from text_generation_router.token_scores import TopTokens
from text_generation_router.token_stream import FinishReason, TokenOutput, TokenStream
from text_generation_router.tokenizer import Tokenizer


class SequenceOutput:
    """One sequence's way from token ids to its stream: `push` makes text of a token, `publish` hands it out."""

    def __init__(self, sequence: Sequence, stream: TokenStream, tokenizer: Tokenizer) -> None:
        request = sequence.request
        self.sequence = sequence
        self.stream = stream
        stream.prompt_scores = sequence.prompt_scores
        self.finish_reason: FinishReason | None = None
        self.last_token_ns = 0  # when the newest token came; 0: none yet
        self._outputs: list[TokenOutput] = []
        self._special_texts = tokenizer.vocabulary.special_texts
        self._detokenizer = Detokenizer(tokenizer.vocabulary, request.token_ids)
        self._stop_strings = (
            StopStrings(request.stop_strings, request.keep_stop_string) if request.stop_strings else None
        )

    def push(self, token_id: int, logprob: float, reason: FinishReason | None, top_tokens: TopTokens = ()) -> None:
        """Take one token in, the last one if `reason` is given; a stop string sets `finish_reason` too."""
        is_special = token_id in self._special_texts
        if reason is FinishReason.STOP_SEQUENCE and not self.sequence.request.keep_stop_string:
            self._end_before(token_id, logprob, is_special, top_tokens)
            return
        text = self._detokenizer.push(token_id)
        special_text = self._special_texts[token_id] if is_special else ""
        if is_special and token_id in self.sequence.request.shown_special_ids:
            text, special_text = text + special_text, ""
        is_last = reason is not None
        if is_last:
            text += self._detokenizer.flush()
        if self._stop_strings is not None:
            text, has_stopped = self._stop_strings.push(text, special_text)
            if has_stopped:
                # Where stop strings are cut off, one that the last allowed token completes is why the text ends.
                if reason is None or not self.sequence.request.keep_stop_string:
                    reason = FinishReason.STOP_SEQUENCE
            elif is_last:
                text += self._stop_strings.flush()
        self._outputs.append(TokenOutput(token_id, logprob, text, is_special, top_tokens))
        self.finish_reason = reason

    def _end_before(self, token_id: int, logprob: float, is_special: bool, top_tokens: TopTokens) -> None:
        """The text ends before a token of `stop_token_ids`."""
        text = self._detokenizer.flush()
        if self._stop_strings is not None:
            text, has_stopped = self._stop_strings.push(text)
            if not has_stopped:
                text += self._stop_strings.flush()
        self._outputs.append(TokenOutput(token_id, logprob, text, is_special, top_tokens))
        self.finish_reason = FinishReason.STOP_SEQUENCE

    def publish(self) -> None:
        """Write to the stream, once a step, what was pushed."""
        outputs, self._outputs = self._outputs, []
        if self.finish_reason is None:
            self.stream.write(outputs)
        else:
            self._tell_costs()
            self.stream.finish(self.finish_reason, outputs)

    def fail(self, error: RouterError) -> None:
        """End the stream with an error."""
        self._tell_costs()
        self.stream.fail(error)

    def _tell_costs(self) -> None:
        self.stream.num_preemptions = self.sequence.num_preemptions
        self.stream.num_recomputed_tokens = self.sequence.num_recomputed_tokens
