"""Logging to stderr, and the start-up timeline. The launcher adds each process's name.

A line is `LEVEL target: message`; with `--json-output` it is one JSON object instead.
"""

import json
import logging
import sys
import time
from datetime import UTC, datetime

logger = logging.getLogger(__name__)

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _PlainFormatter(logging.Formatter):
    """`LEVEL target: message`, with a traceback below it."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the message both at the top and under `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        timestamp = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        return json.dumps(
            {
                "timestamp": timestamp.replace("+00:00", "Z"),
                "level": record.levelname,
                "message": message,
                "fields": {"message": message},
                "target": record.name,
            }
        )


def set_up_logging(level: str, json_output: bool) -> None:
    """Send this process's log lines to stderr. An unknown level is taken for `info`."""
    logging.addLevelName(logging.WARNING, "WARN")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if json_output else _PlainFormatter())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.INFO)
    logging.getLogger("text_generation_shard").setLevel(_LEVELS.get(level.lower(), logging.INFO))


class Timeline:
    """Logs how long each phase of start-up took; the phases follow each other without a gap."""

    def __init__(self, started_ns: int) -> None:
        self._started_ns = started_ns
        self._phase_started_ns = started_ns

    def phase_ends(self, phase: str) -> None:
        """The phase that began where the one before it ended is over."""
        now = time.monotonic_ns()
        logger.info("Start-up phase %s took %.3f s", phase, (now - self._phase_started_ns) / 1e9)
        self._phase_started_ns = now

    def total(self) -> None:
        """All phases are over."""
        logger.info("Ready after %.3f s", (self._phase_started_ns - self._started_ns) / 1e9)
