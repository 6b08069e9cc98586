"""The live page, one self-contained document made of the three files beside this one.

It is a shell without data: what it shows comes from /ui/state, and its chat box speaks to /v1/chat/completions.
"""

import base64
import hashlib
from importlib.resources import files


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """What a policy calls an inline script or style: its digest."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE, _SCRIPT = _read("page.css"), _read("page.js")
PAGE = _read("page.html").replace("/* page.css */", _STYLE).replace("/* page.js */", _SCRIPT)
# Only this very style and script, and requests to this very server.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_source(_STYLE)}",
        f"script-src {_source(_SCRIPT)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
