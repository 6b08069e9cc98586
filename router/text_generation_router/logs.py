"""Logging to stderr: one line a record, plain or as a JSON object. The launcher adds the process's prefix."""

import json
import logging
import sys
from datetime import UTC, datetime

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {0x0A: "\\n"}


def _level_name(record: logging.LogRecord) -> str:
    return "WARN" if record.levelno == logging.WARNING else record.levelname


class PlainFormatter(logging.Formatter):
    """`LEVEL target: message`, then the traceback if there is one. Control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage().translate(_CONTROL_CHARACTERS)
        line = f"{_level_name(record)} {record.name}: {message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a record, its traceback part of the message."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return json.dumps(
            {
                "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
                "level": _level_name(record),
                "message": message,
                "fields": {"message": message, **getattr(record, "fields", {})},
                "target": record.name,
            }
        )


def set_up_logging(level: str, json_output: bool) -> None:
    """Send every logger's records of at least `level` to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_output else PlainFormatter())
    logging.basicConfig(level=_LEVELS.get(level.lower(), logging.INFO), handlers=[handler], force=True)
    # asyncio's own debug lines tell an operator nothing.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
