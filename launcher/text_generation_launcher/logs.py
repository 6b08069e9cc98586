"""The one log of the server: the launcher's own records and its children's lines, in one shape, on standard error.

Children are always told to log JSON; what a native library prints in between is taken as text at level INFO.
"""

import json
import logging
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.ERROR,
    "off": logging.ERROR,
}
_NAMES = {logging.DEBUG: "DEBUG", logging.INFO: "INFO", logging.WARNING: "WARN", logging.ERROR: "ERROR"}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) not in "\n\t"}


def level_name(log_filter: str) -> str:
    """One of debug, info, warn, error: LOG_LEVEL, or the first level in it if it is a filter like `info,grpc=off`."""
    for word in re.split(r"[,=]", log_filter.lower()):
        if word.strip() in _LEVELS:
            return _NAMES[_LEVELS[word.strip()]].lower()
    return "info"


class LogWriter:
    """Writes records as lines; safe to use from several threads."""

    def __init__(self, level: str = "info", json_output: bool = False, stream: TextIO | None = None) -> None:
        self._threshold = _LEVELS[level]
        self._json_output = json_output
        self._stream = stream
        self._lock = threading.Lock()

    def write(self, record: dict[str, Any]) -> None:
        """Write a record with the keys timestamp, level, message and target, and any others."""
        if _LEVELS.get(str(record["level"]).lower(), logging.INFO) < self._threshold:
            return
        line = json.dumps(record, ensure_ascii=False) if self._json_output else _plain(record)
        try:
            with self._lock:
                stream = self._stream or sys.stderr
                stream.write(line + "\n")
                stream.flush()
        except (OSError, ValueError):
            pass  # whoever read the log has gone; the server goes on

    def write_child_line(self, child: str, line: str) -> list[str]:
        """Write one line of a child under its name; returns its text as lines, for a report of its death."""
        record = _parsed(line)
        if record is None:
            record = new_record(logging.INFO, child, line)
        else:
            record["target"] = f"{child}: {record['target']}"
        self.write(record)
        return str(record["message"]).splitlines()


class RecordHandler(logging.Handler):
    """Hands the launcher's own log records to a LogWriter."""

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record, with its traceback if it has one."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        self._writer.write(new_record(record.levelno, record.name, message))


def new_record(level: int, target: str, message: str) -> dict[str, Any]:
    """A record as of now."""
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    name = _NAMES.get(level, "ERROR" if level > logging.ERROR else "DEBUG")
    return {"timestamp": now, "level": name, "message": message, "fields": {"message": message}, "target": target}


def _parsed(line: str) -> dict[str, Any] | None:
    """A child's own record, completed; None if the line is not one."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or str(record.get("level")).lower() not in _LEVELS or "message" not in record:
        return None
    complete = new_record(logging.INFO, str(record.get("target", "")), str(record["message"]))
    return {**complete, **record, "message": complete["message"], "target": complete["target"]}


def _plain(record: dict[str, Any]) -> str:
    line = f"{record['timestamp']} {str(record['level']).upper():>5} {record['target']}: {record['message']}"
    return line.translate(_CONTROL)
