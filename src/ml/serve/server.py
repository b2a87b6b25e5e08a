"""Uvicorn with what it lacks: time limits on half-sent requests, a drain before shutdown, problem details of its own."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ml.serve.problems import MEDIA_TYPE, Problem

MOST_HEADERS = 2**16  # bytes of a request's line and headers
MOST_CONNECTIONS = 2048  # of one worker
ACCEPTED = 32  # new connections in one turn of the loop


class Protocol(HttpToolsProtocol):
    """One connection. `since`: when it began to wait for the rest of a request; 0 while it waits for none."""

    since = 0.0
    received = 0
    stuck_since = 0.0  # when the client stopped reading its answer

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.since = time.monotonic()
        if len(self.connections) > MOST_CONNECTIONS:
            self.refuse(Problem(503, "busy", "Too many connections.", {"Retry-After": "1"}))

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.since and (self.cycle is None or self.cycle.response_complete):  # still in the headers
            self.received += len(data)
            if self.received > MOST_HEADERS and not self.transport.is_closing():
                self.refuse(Problem(431, "headers-too-long", f"The headers exceed {MOST_HEADERS:,} bytes."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.since, self.received = time.monotonic(), 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.since = 0.0

    def send_400_response(self, msg: str) -> None:
        self.refuse(Problem(400, "bad-http", msg))

    def refuse(self, problem: Problem) -> None:
        """Answer without the application, and close."""
        body = problem.body()
        headers = {
            "Content-Type": MEDIA_TYPE,
            "Content-Length": str(len(body)),
            "Connection": "close",
            **problem.headers,
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[problem.status] + lines.encode() + b"\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stuck_since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stuck_since = 0.0

    def close_if_late(self, deadline: float) -> None:
        if self.stuck_since and self.stuck_since < deadline:
            self.transport.abort()
            return
        if self.since and self.since < deadline and not self.transport.is_closing():
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                self.refuse(Problem(408, "too-slow", "The request did not arrive in time."))
            else:
                self.transport.close()


class DrainingServer(Server):
    """After SIGTERM: /ready answers 503 and every answer closes its connection, but all requests are still answered
    for `drain` seconds, so that a load balancer can turn away first; then what is in flight is finished."""

    def __init__(self, config: Config, drain: float, timeout: float, app: Any) -> None:
        super().__init__(config)
        self.drain, self.timeout, self.application = drain, timeout, app
        self.asked_to_exit = 0.0
        self.listener: socket.socket | None = None
        self.accepting: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        (self.listener,) = sockets or []
        asyncio.get_running_loop().add_reader(self.listener, self.accept)

    def accept(self) -> None:
        """Take several waiting connections.

        libuv takes one in a turn of the loop; with hundreds of busy connections a turn takes 0.1 s, and a new one, such as
        that of a liveness probe, then waited for as long as the load lasted.
        """
        loop, listener = asyncio.get_running_loop(), self.listener
        assert listener is not None
        for _ in range(ACCEPTED):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor or memory left: not again in this very moment
                loop.remove_reader(listener)
                loop.call_later(0.1, self.accept_again)
                return
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = loop.create_task(loop.connect_accepted_socket(self.protocol, connection))
            self.accepting.add(task)
            task.add_done_callback(self.accepted)

    def accept_again(self) -> None:
        if self.listener is not None:
            asyncio.get_running_loop().add_reader(self.listener, self.accept)

    def accepted(self, task: "asyncio.Task[Any]") -> None:
        self.accepting.discard(task)
        if not task.cancelled():
            task.exception()  # the client has gone already: nobody to tell

    def protocol(self) -> asyncio.Protocol:
        return Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.listener is not None:
            asyncio.get_running_loop().remove_reader(self.listener)
            self.listener = None
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.asked_to_exit:  # a second time: at once
            self.should_exit = True
        self.asked_to_exit = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if counter % 5 == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.close_if_late(now - self.timeout)
        if self.asked_to_exit:
            self.application.draining = True
            if now - self.asked_to_exit >= self.drain:
                self.should_exit = True
        return await super().on_tick(counter)


def serve(
    app: Any, listener: socket.socket, drain: float, timeout: float, begin: Callable[[], Awaitable[None]]
) -> None:
    """Answer on `listener` until SIGTERM or SIGINT; `begin` runs beside it from the start."""
    config = Config(
        app,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=10,
    )
    server = DrainingServer(config, drain, timeout, app)

    async def run() -> None:
        beside = asyncio.ensure_future(begin())
        try:
            await server.serve(sockets=[listener])
        finally:
            beside.cancel()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
