"""API keys: `--api-key`, and the tenants of `--api-keys-file`. Only digests are kept, and compared in constant time."""

import hashlib
import hmac
import re
from pathlib import Path

MAX_KEYS = 10_000
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FORM = (
    "a line is NAME:DIGEST, the SHA-256 digest of the key as 64 hexadecimal digits, or NAME:key:KEY, the key itself; "
    "names have 1 to 64 letters, digits, `.`, `_` or `-`"
)


class InvalidKeysFile(ValueError):
    """A file of keys that cannot be used; the text says which line and why, and never shows a key."""


class ApiKeys:
    """Who may send requests: a name for each digest of a key. The name of `--api-key` is empty."""

    def __init__(self, names: dict[bytes, str]) -> None:
        self._names = list(names.items())

    @classmethod
    def read(cls, api_key: str | None, path: str | None) -> "ApiKeys | None":
        """The keys of a flag and a file; None without either. Raises InvalidKeysFile."""
        if api_key is None and path is None:
            return None
        names = {} if path is None else _read_file(Path(path))
        if api_key is not None:
            names[_digest(api_key)] = ""
        return cls(names)

    def owner(self, authorization: str) -> str | None:
        """Whose key a header `Authorization` carries; None when it carries none of them.

        Every digest is compared, each in constant time, so the duration tells neither content nor place of a key.
        """
        scheme, _, key = authorization.partition(" ")
        given = _digest(key)
        owner = None
        for digest, name in self._names:
            if hmac.compare_digest(given, digest):
                owner = name
        return owner if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read_file(path: Path) -> dict[bytes, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidKeysFile(f"--api-keys-file {path} cannot be read: {error}") from None
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = line.strip().partition(":")
        digest = _line_digest(value)
        if digest is None or not _NAME.fullmatch(name):
            raise InvalidKeysFile(f"--api-keys-file {path}, line {number}: {_FORM}")
        if names.setdefault(digest, name) != name:
            raise InvalidKeysFile(f"--api-keys-file {path}, line {number}: two names have the same key")
    if not names:
        raise InvalidKeysFile(f"--api-keys-file {path} holds no key: {_FORM}")
    if len(names) > MAX_KEYS:
        raise InvalidKeysFile(f"--api-keys-file {path} holds {len(names)} keys, at most {MAX_KEYS} are taken")
    return names


def _line_digest(value: str) -> bytes | None:
    if _DIGEST.fullmatch(value):
        return bytes.fromhex(value)
    key = value.removeprefix("key:")
    return _digest(key) if key and key != value else None
