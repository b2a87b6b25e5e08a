"""Requests as handlers see them, answers as GitLab words them, and a router on the undecoded path.

GitLab takes `:id` as a number or as a percent-encoded path (`g%2Fproj`), so a route is matched before decoding:
after it, `/projects/g/proj/uploads` could not be told apart. (doc/api/rest: "Namespaced paths")
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.gitlab_emulator.rights import Right, right
from tests.gitlab_emulator.state import MergeRequest, Project, State, Token


class ApiError(Exception):
    """An answer other than success; `body` is the JSON that GitLab sends with it."""

    def __init__(self, status: int, body: str | dict[str, Any]) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = {"message": body} if isinstance(body, str) else body


def not_found(what: str = "") -> ApiError:
    return ApiError(404, f"404 {what + ' ' if what else ''}Not Found")


@dataclass
class Call:
    """One request: where it goes, who sends it, and what it carries."""

    method: str
    base_url: str
    arguments: dict[str, str]  # from the path, decoded
    query: dict[str, str]
    data: dict[str, Any]  # of a form, JSON or multipart body
    files: dict[str, tuple[str | None, bytes]]  # of a multipart body: file name, content
    body: bytes
    headers: dict[str, str]
    state: State
    token: Token | None = None
    project: Project = field(init=False)  # set by the router for routes with :id

    def __getitem__(self, name: str) -> str:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A parameter, which GitLab takes from the body or the query alike."""
        return self.data.get(name, self.query.get(name, default))

    def require(self, *names: str) -> list[Any]:
        """Raises ApiError as grape does: `{"error": "body is missing"}`, 400."""
        missing = [name for name in names if self.get(name) is None]
        if missing:
            raise ApiError(400, {"error": ", ".join(f"{name} is missing" for name in missing)})
        return [self.get(name) for name in names]

    @property
    def merge_request(self) -> MergeRequest:
        iid = self["iid"]
        found = self.project.merge_requests.get(int(iid)) if iid.isdecimal() else None
        if found is None:
            raise not_found()
        return found

    @property
    def project_url(self) -> str:
        return f"{self.base_url}/{self.project.path}"


Handler = Callable[[Call], Any]


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    pattern: re.Pattern[str]
    handler: Handler
    right: Right


class Router:
    def __init__(self) -> None:
        self.routes: list[Route] = []

    def __call__(self, method: str, path: str) -> Any:
        """Decorator for a handler of `method` `path`, in which `:name` is one segment and `*name` all the rest.

        Who may call it says its row in rights.py.
        """
        pattern = re.sub(r":(\w+)", r"(?P<\1>[^/]+)", path)
        pattern = re.sub(r"\*(\w+)", r"(?P<\1>.+)", pattern)

        def register(handler: Handler) -> Handler:
            known = Route(method, path, re.compile(pattern), handler, right(method, path))
            self.routes.append(known)
            return handler

        return register

    def find(self, method: str, raw_path: str) -> tuple[Route, dict[str, str]]:
        """Raises ApiError: 404 for an unknown path, 405 for a known one with another method."""
        known = False
        for route in self.routes:
            match = route.pattern.fullmatch(raw_path)
            if match is not None:
                known = True
                if route.method == method or (method == "HEAD" and route.method == "GET"):
                    return route, {name: unquote(value) for name, value in match.groupdict().items()}
        raise (
            ApiError(405, {"error": "405 Not Allowed"})
            if known
            else ApiError(404, {"error": "404 Not Found"})
        )


route = Router()


async def read_body(request: Request) -> tuple[dict[str, Any], dict[str, tuple[str | None, bytes]], bytes]:
    """The parameters, files and bytes of a body as form, JSON or multipart, sent whole or in chunks."""
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind == "application/json" and body:
        try:
            data = json.loads(body)
        except ValueError:
            raise ApiError(
                400, {"error": "The provided content-type 'application/json' is invalid"}
            ) from None
        return (data if isinstance(data, dict) else {}), {}, body
    if kind not in ("application/x-www-form-urlencoded", "multipart/form-data"):
        return {}, {}, body
    pairs: list[tuple[str, str]] = []
    files = {}
    async with request.form(max_part_size=20_000_000) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files[name] = (value.filename, await value.read())
            else:
                pairs.append((name, value))
    return nested(pairs), files, body


def nested(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """`a[b][]=1` as Rails reads it: `{"a": {"b": ["1"]}}`."""
    data: dict[str, Any] = {}
    for name, value in pairs:
        keys = re.findall(r"[^\[\]]+|\[\]", name)
        place = data
        for key, following in zip(keys, keys[1:], strict=False):
            if following == "[]":
                place.setdefault(key, []).append(value)
                break
            place = place.setdefault(key, {})
        else:
            place[keys[-1]] = value
    return data


def answer(result: Any, method: str) -> Response:
    """A handler's result as HTTP: None is 204, a Response is itself, anything else JSON with 201 after POST."""
    if isinstance(result, Response):
        return result
    if result is None:
        return Response(status_code=204)
    return JSONResponse(result, status_code=201 if method == "POST" else 200)
