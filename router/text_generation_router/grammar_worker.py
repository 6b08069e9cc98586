"""The process that checks and tries grammars for the router, who may kill it at any moment.

Frames (grammar_frames.py) go over standard input and output. First come the tokens, as three frames (two columns of
byte strings, one of EOS ids), answered by an empty frame once they are loaded. Each further frame is a grammar,
answered by its canonical text or the reason why it is refused.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from text_generation_proto.columns import unpack_int32, unpack_strings
from text_generation_proto.matcher import InvalidGrammar, TokenTable, check

from text_generation_router.grammar_frames import BAD, GOOD, LENGTH_BYTES, frame, unpack
from text_generation_router.grammar_text import canonical_text
from text_generation_router.schema_checks import RefusedGrammar

# Address space that a grammar may take beside what the process has with its tokens loaded. Large schemas take 50 MB.
MAX_GRAMMAR_MEMORY_BYTES = 192 << 20
# Other processes' work is more urgent than a grammar that has not been accepted yet.
NICENESS = 10
# Tokens that a trial writes: what is too complex shows at the first of them.
NUM_TRIAL_TOKENS = 16
MAX_REASON_CHARACTERS = 300

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame; None if the stream ends before the frame does."""
    header = stream.read(LENGTH_BYTES)
    length = int.from_bytes(header)
    content = stream.read(length)
    return content if len(header) == LENGTH_BYTES and len(content) == length else None


def answer(tokens: TokenTable, request: bytes) -> bytes:
    """Canonical text or refusal, for one request."""
    try:
        canonical = canonical_text(unpack(request), tokens)
        try_out(tokens, canonical)
    except (RefusedGrammar, InvalidGrammar) as error:
        return BAD + _reason(error)[:MAX_REASON_CHARACTERS].encode()
    except MemoryError:
        return BAD + b"needs too much memory"
    return GOOD + canonical.encode()


def _reason(error: ValueError) -> str:
    """The error's text; the library's own names an option that clients do not have."""
    text = str(error)
    return "has a `oneOf` whose branches may not exclude each other" if "coerce_one_of" in text else text


def try_out(tokens: TokenTable, text: str) -> None:
    """Compile a grammar and write a few tokens with it; raises InvalidGrammar."""
    matcher = tokens.compile(text)
    for _ in range(NUM_TRIAL_TOKENS):
        mask = matcher.compute_bitmask()
        check(matcher)
        if matcher.is_stopped():
            return
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        matcher.consume_token(int(allowed[len(allowed) // 2]))
        check(matcher)


def _limit_memory() -> None:
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = num_pages * resource.getpagesize() + MAX_GRAMMAR_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a grammar that needs more ends the process


def main() -> None:
    """Answer requests until the router closes the connection."""
    # The end of the requests cannot be seen while a grammar compiles, so the kernel ends this process with its parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    lengths, joined, eos_token_ids = (read_frame(requests) for _ in range(3))
    if lengths is None or joined is None or eos_token_ids is None:
        return
    tokens = TokenTable(unpack_strings(lengths, joined), unpack_int32(eos_token_ids).tolist())
    _limit_memory()
    os.nice(NICENESS)
    answers.write(frame(b""))
    answers.flush()
    while (request := read_frame(requests)) is not None:
        answers.write(frame(answer(tokens, request)))
        answers.flush()


if __name__ == "__main__":
    main()
