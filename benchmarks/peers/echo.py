"""The limit: a bare ASGI application that reads the body and sends a fixed answer of the usual size."""

from typing import Any

HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"256")],
}
BODY = {"type": "http.response.body", "body": b"{" + b" " * 254 + b"}"}


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send(HEAD)
    await send(BODY)
