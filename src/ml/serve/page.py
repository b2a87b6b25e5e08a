"""The page at `/`: draw (or type, where the model takes no pictures) and see what the live model says.

One HTML file, nothing from anywhere else.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from ml.serve.images import SMALLEST


@cache
def page(height: int, width: int) -> tuple[bytes, dict[str, str]]:
    """The HTML for a model that takes images of this size, and the headers to send with it.

    The policy lets the browser run the page's own script and style, known by their hash, and talk to this server;
    nothing else, so a class name or tag that were taken for HTML could do nothing.
    """
    body = (files("ml.serve") / "page.html").read_bytes()
    kind = "picture" if min(height, width) >= SMALLEST else "numbers"
    body = body.replace(
        b"<body>", f'<body data-takes="{kind}" data-height="{height}" data-width="{width}">'.encode()
    )
    policy = {
        "default-src": "'none'",
        "script-src": source(body, b"script"),
        "style-src": source(body, b"style"),
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return body, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def source(body: bytes, tag: bytes) -> str:
    """The one inline element of this kind, as a source of a Content-Security-Policy."""
    (content,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"
