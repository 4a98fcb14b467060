"""The page at /: a chat that shows what was drafted. One file, no network but this server."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources


def page_html() -> str:
    """The whole page, style and code inside."""
    html, style, code = (_read(name) for name in ("page.html", "page.css", "page.js"))
    return html.replace("/*STYLE*/", style).replace("/*CODE*/", code)


def page_headers() -> dict[str, str]:
    """What a browser may do on it: run our style and our code, by their hashes, and ask this server. Nothing else."""
    policy = (
        f"default-src 'none'; style-src {_hash('page.css')}; script-src {_hash('page.js')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _read(name: str) -> str:
    return (resources.files("specdec.serve") / name).read_text("utf-8")


def _hash(name: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(_read(name).encode()).digest()).decode()}'"
