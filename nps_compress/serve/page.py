"""The page at ``/`` for people: it needs no network but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

HTML = (files("nps_compress.serve") / "page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """Of what stands in the page's elements of a name, so that nothing else may run."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", HTML, re.S)
    digests = (hashlib.sha256(text.encode()).digest() for text in found)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


HEADERS = {
    "content-security-policy": f"default-src 'none'; connect-src 'self'; img-src data:; "
    f"script-src {_hashes('script')}; style-src {_hashes('style')}; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
