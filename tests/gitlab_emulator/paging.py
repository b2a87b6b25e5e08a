"""Lists come in pages of 20, at most 100, with the headers of doc/api/rest "Offset-based pagination"."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode

from starlette.responses import JSONResponse

from tests.gitlab_emulator.routing import Call

Item = TypeVar("Item")


def as_is(item: Any) -> Any:
    return item


def paged(call: Call, items: Sequence[Item], path: str, view: Callable[[Item], Any] = as_is) -> JSONResponse:
    """The page of `items` that the query asks for, each as `view` shows it; `path` is the route below /api/v4."""
    page = max(1, _number(call, "page", 1))
    per_page = min(100, max(1, _number(call, "per_page", 20)))
    pages = max(1, -(-len(items) // per_page))
    url = f"{call.base_url}/api/v4{path}"

    def link(number: int, relation: str) -> str:
        return f'<{url}?{urlencode(call.query | {"page": number, "per_page": per_page})}>; rel="{relation}"'

    links = [link(page - 1, "prev")] if page > 1 else []
    links += [link(page + 1, "next")] if page < pages else []
    links += [link(1, "first"), link(pages, "last")]
    headers = {
        "X-Total": str(len(items)),
        "X-Total-Pages": str(pages),
        "X-Page": str(page),
        "X-Per-Page": str(per_page),
        "X-Next-Page": str(page + 1) if page < pages else "",
        "X-Prev-Page": str(page - 1) if page > 1 else "",
        "Link": ", ".join(links),
    }
    shown = [view(item) for item in items[(page - 1) * per_page : page * per_page]]
    return JSONResponse(shown, headers=headers)


def _number(call: Call, name: str, default: int) -> int:
    text = call.query.get(name, "")
    return int(text) if text.isdecimal() else default
