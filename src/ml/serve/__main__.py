"""Serve a model: `python -m ml.serve`. Every setting is an environment variable; docs/serving.md lists them."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy would start a thread for each core, for nothing

import argparse
import asyncio
import importlib
import shutil
import signal
import socket
import sys

from ml.errors import UserError, exit_on_user_error
from ml.serve.board import READY, Board
from ml.serve.live_model import LiveModel, folder_of, follow, start_from
from ml.serve.model import load
from ml.serve.settings import ServeSettings, load_settings
from ml.serve.state import State
from ml.serve.store.base import open_store
from ml.serve.supervisor import STARTUP_FAILED, supervise
from ml.serve.telemetry import Telemetry, log_line, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ml.serve", description=__doc__)
    parser.add_argument("--check", action="store_true", help="load and check the model, say its tag, and end")
    arguments = parser.parse_args()
    settings = load_settings()
    folder = folder_of(settings.serve_state)
    state = State(folder, settings.serve_max_model)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # until the server is up; leaves by the `finally` below
    code = 1
    try:
        pointer = start_from(state, open_store(settings, folder / "cache"), settings.model_tag)
        if arguments.check:
            load(state.bundle(pointer.digest, pointer.tag))
            print(pointer.tag)
            return
        code = run(settings, state)
    finally:
        if settings.serve_state is None:
            shutil.rmtree(folder, ignore_errors=True)
    if code:
        raise UserError("the server could not start; the lines above say why.")


def run(settings: ServeSettings, state: State) -> int:
    listener = listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    write(log_line("info", "listening", host=host, port=port, workers=settings.workers, pid=os.getpid()))
    board = Board(settings.workers)
    if settings.workers == 1:
        work(settings, state, board, listener, 0)
        return 0
    importlib.import_module("onnxruntime")  # before the fork, so that a new worker is there in a moment
    return supervise(board, lambda worker: work(settings, state, board, listener, worker))


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise UserError(
            f"HOST {host} PORT {port} cannot be listened on: {error.strerror}. Choose another PORT."
        ) from None
    listener.setblocking(False)
    return listener


def work(settings: ServeSettings, state: State, board: Board, listener: socket.socket, worker: int) -> None:
    """One worker, until SIGTERM. Exits with STARTUP_FAILED when the model does not load."""
    from ml.serve.front import Front
    from ml.serve.server import serve

    sys.setswitchinterval(0.0005)  # else each step of a thread that decodes waits 5 ms for a busy loop
    telemetry = Telemetry(board, worker)
    live = LiveModel(state, telemetry, 8 * settings.serve_max_images, settings.serve_timeout)
    try:
        live.start()
    except UserError as error:
        write(log_line("error", "start_failed", worker=worker, problem=str(error)))
        if settings.workers == 1:
            raise
        sys.exit(STARTUP_FAILED)
    front = Front(settings, live, telemetry)
    if settings.otel_exporter_otlp_endpoint:
        from ml.serve.tracing import start_tracing

        front.tracer = start_tracing(worker)

    parent = os.getppid()

    async def begin() -> None:
        telemetry.fixed[READY] = 1
        following = asyncio.ensure_future(follow(live))
        while settings.workers == 1 or os.getppid() == parent:
            await asyncio.sleep(1)
        following.cancel()
        os.kill(os.getpid(), signal.SIGTERM)  # the supervisor was killed: nobody would end this worker

    serve(front, listener, settings.serve_drain, settings.serve_timeout, begin)
    telemetry.flush()
    telemetry.log("info", "stopped")


if __name__ == "__main__":
    exit_on_user_error(main)
