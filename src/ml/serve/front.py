"""The ASGI application: the routes that are called often, answered before the framework, and the way to the others.

A request through FastAPI's routing, form parsing and JSON response costs 200 µs; here it costs a tenth. `ml.serve.api`
declares the same routes in the OpenAPI schema, and serves those that are called seldom.
"""

import asyncio
import hmac
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, cast, get_args
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from ml.serve import images, invocations, metrics, multipart
from ml.serve.images import Invert, Picture, Target
from ml.serve.live_model import Batcher, LiveModel
from ml.serve.problems import MEDIA_TYPE, Problem, busy
from ml.serve.settings import ServeSettings
from ml.serve.telemetry import DELAY, Telemetry

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Answer = tuple[int, bytes, bytes]  # status, content type, body

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
JSON = b"application/json"
DECODERS = 2  # threads for images that take long to decode
DECODING = 16  # such images that may wait in one worker
BODIES = 4  # times SERVE_MAX_BODY: bytes of unfinished requests in one worker
REFUSAL = 0.5  # seconds, more or less, that a refused request waits: see `Front.hold`
MANAGEMENT = ("/replace_ml_model", "/rollback_ml_model")
FRAMEWORK = {  # routes that ml.serve.api answers, with their methods
    "/get_experiments_metas": "GET, HEAD",
    "/replace_ml_model": "POST",
    "/rollback_ml_model": "POST",
    "/openapi.json": "GET, HEAD",
    "/docs": "GET, HEAD",
    "/": "GET, HEAD",
}


class Disconnected(Exception):
    """The client has gone: nobody reads an answer."""


class Request:
    """What the handlers need of a request; headers are searched when they are asked for."""

    __slots__ = ("scope", "receive", "front", "id", "count", "serving")

    def __init__(self, scope: Scope, receive: Receive, front: "Front", request_id: str) -> None:
        self.scope, self.receive, self.front, self.id = scope, receive, front, request_id
        self.count = 0  # images
        self.serving = front.serving()  # one model for the whole request, whatever goes live meanwhile

    def header(self, name: bytes) -> bytes | None:
        for found, value in self.scope["headers"]:
            if found == name:
                return cast(bytes, value)
        return None

    async def body(self) -> bytes:
        """The whole body. Raises Problem 413 before reading one that says that it is too long."""
        front = self.front
        limit = front.settings.serve_max_body
        check_length(self.header(b"content-length"), limit)
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > limit:
                raise too_long(limit)
            return body
        chunks, size = [body], len(body)
        front.buffered += size
        try:
            while message.get("more_body", False):
                if front.buffered > limit * BODIES:
                    raise busy("Too many large requests at a time.")
                if size > limit:
                    raise too_long(limit)
                message = await self.receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                chunk = message.get("body", b"")
                chunks.append(chunk)
                size += len(chunk)
                front.buffered += len(chunk)
        finally:
            front.buffered -= size
        if size > limit:
            raise too_long(limit)
        return b"".join(chunks)


def check_length(value: bytes | None, limit: int) -> None:
    if value is not None and (not value.isdigit() or int(value) > limit):
        raise too_long(limit)


def too_long(limit: int) -> Problem:
    # The connection stays: uvicorn reads on and drops it, so that the client can finish sending and read the answer.
    return Problem(413, "body-too-long", f"The body is longer than {limit:,} bytes.")


class Front:
    def __init__(self, settings: ServeSettings, live: LiveModel, telemetry: Telemetry) -> None:
        self.settings, self.live, self.telemetry = settings, live, telemetry
        self.in_flight = 0
        self.buffered = 0  # bytes of bodies that are not complete yet
        self.decoding = 0
        self.held = 0  # refused requests that wait for their answer
        self.draining = False
        self.framework: Any = None
        self.building: asyncio.Task[Any] | None = None
        self.tracer: Callable[..., None] | None = None
        self.decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self.id_prefix, self.id_number = os.urandom(6).hex(), 0
        self.served: tuple[Batcher | None, "Serving"] = (None, cast("Serving", None))
        self.routes: dict[str, tuple[str, Callable[[Request], Awaitable[Answer]]]] = {
            "/predict": ("POST", self.predict),
            "/invocations": ("POST", self.invocations),
            "/ping": ("GET, HEAD", self.ping),
            "/health": ("GET, HEAD", self.health),
            "/ready": ("GET, HEAD", self.ready),
            "/version": ("GET, HEAD", self.version),
            "/metrics": ("GET, HEAD", self.metrics),
        }
        self.weighty = {"/predict", "/invocations"}  # refused when too many are in flight; the others never

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        telemetry = self.telemetry
        path, method = scope["path"], scope["method"]
        request_id = ""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                if REQUEST_ID.fullmatch(value):
                    request_id = value.decode()
                break
        if not request_id:
            self.id_number += 1
            request_id = f"{self.id_prefix}-{self.id_number}"
        request = Request(scope, receive, self, request_id)
        in_flight = telemetry.in_flight_slot
        self.in_flight += 1
        telemetry.values[in_flight] = self.in_flight
        status = 500
        more: tuple[tuple[bytes, bytes], ...] = ()
        refused = False
        try:
            try:
                while self.live.changed():
                    await self.live.refresh()
                request.serving = self.serving()
                found = self.routes.get(path)
                if found is None:
                    if path in FRAMEWORK and method in FRAMEWORK[path]:
                        status = await self.call_framework(request, send)
                        return
                    raise not_here(path, FRAMEWORK.get(path))
                if method not in found[0]:
                    raise not_here(path, found[0])
                if self.in_flight - self.held > self.settings.serve_concurrency and path in self.weighty:
                    raise busy("Too many requests are in flight.")
                status, kind, body = await found[1](request)
            except Problem as problem:
                status, kind, body = problem.status, MEDIA_TYPE.encode(), problem.body(request_id)
                more = tuple(
                    (name.lower().encode(), value.encode()) for name, value in problem.headers.items()
                )
                telemetry.count("errors_total", problem.kind)
                refused = problem.kind == "busy" and path in self.weighty
            except Disconnected:
                status = 499
                return
            except (
                Exception
            ) as error:  # a fault of this code: the log has the traceback, the client an id to name
                self.log_fault(request, error)
                status, kind = 500, MEDIA_TYPE.encode()
                body = Problem(500, "fault", "A fault of the server; its log has the request's id.").body(
                    request_id
                )
                telemetry.count("errors_total", "fault")
            if refused and not self.draining:  # here, where no traceback holds the body any more
                await self.hold(receive)
            await send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [
                        (b"content-type", kind),
                        (b"content-length", b"%d" % len(body)),
                        *self.common_headers(request, request.serving),
                        *more,
                    ],
                }
            )
            await send({"type": "http.response.body", "body": body})
        finally:
            self.in_flight -= 1
            telemetry.values[in_flight] = self.in_flight
            route = path if path in self.routes or path in FRAMEWORK else "unknown"
            if method not in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
                method = "other"
            seconds = time.perf_counter() - started
            telemetry.count_request(route, method, status, seconds)
            telemetry.log_request(
                request_id, method, route, status, seconds, request.serving.tag, request.count
            )
            if self.tracer is not None:
                self.tracer(scope, route, method, status, seconds, request.serving.tag, request_id)

    async def hold(self, receive: Receive) -> None:
        """Let a refused client wait, and drop its body meanwhile.

        A client that is told "busy" at once comes back at once: 7,000 refusals a second took a worker's whole time, left
        a tenth of its answers, and kept liveness waiting for 0.4 s. Held, they cost a tenth of that. The time differs, so that
        they do not all come back together.
        """
        self.held += 1
        try:
            async with asyncio.timeout(REFUSAL * (0.5 + random.random())):
                while (await receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            pass
        finally:
            self.held -= 1

    @property
    def tag(self) -> str:
        return self.live.batcher.model.tag

    def common_headers(self, request: Request, serving: "Serving") -> Headers:
        headers = [
            (b"x-model-tag", serving.tag_header),
            (b"x-request-id", request.id.encode()),
            (b"x-content-type-options", b"nosniff"),
        ]
        if self.draining:  # the client is to connect anew, elsewhere
            headers.append((b"connection", b"close"))
        return headers

    def log_fault(self, request: Request, error: Exception) -> None:
        import traceback

        where = [
            f"{file_name(each.filename)}:{each.lineno} {each.name}"
            for each in traceback.extract_tb(error.__traceback__)
        ]
        # not the exception's text: it may quote what was uploaded
        self.telemetry.log("error", "fault", id=request.id, kind=type(error).__name__, where=where[-8:])

    # Predictions

    def serving(self) -> "Serving":
        """What goes with the live model, made once for each."""
        batcher = self.live.batcher
        if self.served[0] is not batcher:
            self.served = (batcher, Serving(batcher, self.settings))
        return self.served[1]

    async def predict(self, request: Request) -> Answer:
        serving, batcher = request.serving, request.serving.batcher
        query = request.scope["query_string"]
        invert = read_invert(query) if query else "auto"
        body = await request.body()
        content_type = request.header(b"content-type") or b""
        if content_type[:19].lower() == b"multipart/form-data":
            files = multipart.read_files(body, content_type)
        else:
            files = [("", body)]
        if len(files) == 1 and invert == "auto":
            pixels = images.plain_png(files[0][1], serving.target)
            if pixels is not None:
                request.count = 1
                (row,) = await batcher.submit(pixels[None])
                answer = serving.describe(files[0][0], row, serving.plain)
                return 200, JSON, b"".join((serving.head, answer.encode(), b"]}"))
        described: list[tuple[str, Picture]] = []
        for name, data in files:
            for picture in await self.decode(data, serving.target, invert):
                described.append((name, picture))
            if len(described) > self.settings.serve_max_images:
                raise images.too_many_images(len(described), self.settings.serve_max_images)
        request.count = len(described)
        for _, picture in described:
            for what in picture.done:
                self.telemetry.count("images_changed_total", what.partition(" ")[0])
        rows = await batcher.predict(np.stack([picture.pixels for _, picture in described]))
        answers = [
            serving.describe(name, row, describe_picture(picture))
            for (name, picture), row in zip(described, rows)
        ]
        return 200, JSON, b"".join((serving.head, ",".join(answers).encode(), b"]}"))

    async def decode(self, data: bytes, target: Target, invert: Invert) -> list[Picture]:
        if len(data) <= 2048 and images.sniff(data) in ("IDX", "NPY"):
            return images.decode(data, target, invert)
        if self.decoding >= DECODING:
            raise busy("Too many large images are being decoded.")
        self.decoding += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.decoders, images.decode, data, target, invert)
        finally:
            self.decoding -= 1

    async def invocations(self, request: Request) -> Answer:
        serving, batcher = request.serving, request.serving.batcher
        body = await request.body()
        content_type = (request.header(b"content-type") or b"").decode("latin-1")
        arguments = (body, content_type, serving.experiment, self.settings.serve_max_images)
        if len(body) < 2**15:
            found = invocations.parse(*arguments)
        else:
            found = await asyncio.get_running_loop().run_in_executor(
                self.decoders, invocations.parse, *arguments
            )
        request.count = len(found)
        return 200, JSON, invocations.answer(await batcher.predict(found))

    # Everything else

    async def ping(self, request: Request) -> Answer:
        return 200, JSON, b"{}\n"

    async def health(self, request: Request) -> Answer:
        """Alive: the loop turns. Whether to send requests is what /ready says."""
        return 200, JSON, b'{"status":"alive"}'

    async def ready(self, request: Request) -> Answer:
        if self.draining:
            raise Problem(
                503,
                "draining",
                "The server is shutting down; what it has begun is finished.",
                {"Retry-After": "1"},
            )
        return 200, JSON, json.dumps({"status": "ready", "model": self.tag}).encode()

    async def version(self, request: Request) -> Answer:
        return 200, b"text/plain", version("ml").encode()

    async def metrics(self, request: Request) -> Answer:
        await asyncio.sleep(2 * DELAY)  # what any worker has answered by now has been added up then
        return (
            200,
            metrics.CONTENT_TYPE.encode(),
            await asyncio.to_thread(metrics.render, self.telemetry.board),
        )

    async def call_framework(self, request: Request, send: Send) -> int:
        """Hand over to FastAPI; it is imported at the first such request, which saves half a second at start."""
        path = request.scope["path"]
        if path in MANAGEMENT:
            check_token(request.header(b"authorization"), self.settings.token)
        if self.framework is None:
            from ml.serve.api import build_api

            if self.building is None:
                self.building = asyncio.create_task(asyncio.to_thread(build_api, self))
            self.framework = await asyncio.shield(self.building)
        body = await request.body() if request.scope["method"] == "POST" else b""
        sent, status = False, 500

        async def receive() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await request.receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_more(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *self.common_headers(request, self.serving())]
            await send(message)

        request.scope["request_id"] = request.id
        await self.framework(request.scope, receive, send_more)
        return status


class Serving:
    """Texts and limits that go with one model, made once."""

    def __init__(self, batcher: Batcher, settings: ServeSettings) -> None:
        model = batcher.model
        self.batcher, self.experiment, self.tag = batcher, model.experiment, model.tag
        self.tag_header = model.tag.encode()
        self.target = Target(
            model.experiment.image_height,
            model.experiment.image_width,
            model.dark_background,
            settings.serve_max_pixels,
            settings.serve_max_images,
        )
        self.names = [json.dumps(name) for name in model.experiment.class_names]
        self.probabilities = ",".join(f"{name.replace('%', '%%')}:%.7g" for name in self.names)
        self.head = f'{{"model":{json.dumps(model.tag)},"predictions":['.encode()
        width, height = self.target.width, self.target.height
        self.plain = f'"image":{{"format":"PNG","width":{width},"height":{height},"mode":"L"}},"done":[]'

    def describe(self, name: str, row: NDArray[np.float32], picture: str) -> str:
        values = row.tolist()
        best = max(values)
        return (
            f'{{"file":{json.dumps(name)},"class":{self.names[values.index(best)]},"probability":{best:.7g},'
            f'"probabilities":{{{self.probabilities % tuple(values)}}},{picture}}}'
        )


def describe_picture(picture: Picture) -> str:
    image = {"format": picture.format, "width": picture.width, "height": picture.height, "mode": picture.mode}
    return f'"image":{json.dumps(image)},"done":{json.dumps(picture.done)}'


def read_invert(query: bytes) -> Invert:
    try:
        options = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=5)
    except ValueError:
        options = [("?", "")]
    if len(options) != 1 or options[0][0] != "invert" or options[0][1] not in get_args(Invert):
        raise Problem(422, "bad-parameter", "The only parameter is invert: auto, never or always.")
    return cast(Invert, options[0][1])


def not_here(path: str, allowed: str | None) -> Problem:
    if allowed is None:
        return Problem(404, "not-found", "There is no such route. GET /docs lists them.")
    return Problem(405, "method-not-allowed", f"{path} takes {allowed}.", {"Allow": allowed})


def check_token(header: bytes | None, token: str | None) -> None:
    """Raises Problem: 403 when this server has no token, 401 when the request has none or another."""
    if token is None:
        raise Problem(
            403,
            "no-token-configured",
            "This server was started without SERVE_TOKEN, so nobody may change its model.",
        )
    scheme, _, given = (header or b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token.encode()):
        raise Problem(
            401,
            "unauthorized",
            "Send the header Authorization: Bearer TOKEN.",
            {"WWW-Authenticate": "Bearer"},
        )


def file_name(path: str) -> str:
    return path.rpartition("/")[2]
