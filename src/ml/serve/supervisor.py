"""Several workers behind one listening socket: fork them, start anew the one that dies, pass SIGTERM on."""

import os
import signal
import time
from collections.abc import Callable

from ml.serve.board import READY, Board
from ml.serve.telemetry import log_line, write

STARTUP_FAILED = 3  # exit code of a worker that could not begin
WATCHED = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP}
PATIENCE = 18.0  # seconds from SIGTERM to SIGKILL


def supervise(board: Board, run_worker: Callable[[int], None], patience: float = PATIENCE) -> int:
    """Run `run_worker(number)` in board.workers processes until SIGTERM or SIGINT.

    Returns:
        0; 1 when a worker could not even begin, which its successors could not either.
    """
    signal.signal(signal.SIGCHLD, lambda *_: None)  # some systems drop a signal that nobody handles
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    started: dict[int, tuple[int, float]] = {}  # process id → worker, when
    for worker in range(board.workers):
        started[fork(worker, run_worker)] = (worker, time.monotonic())
    failures = 0
    while True:
        received = signal.sigwait(WATCHED)
        if received in (signal.SIGTERM, signal.SIGINT):
            return stop(started, patience)
        for pid, status in reap():
            if pid not in started:
                continue
            worker, since = started.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            ready = board.fixed(worker)[READY]
            write(log_line("error", "worker_died", worker=worker, pid=pid, exit_code=code))
            if code == STARTUP_FAILED and not ready and failures == 0 and not any_ready(board):
                stop(started, patience)
                return 1
            board.fixed(worker)[READY] = 0
            failures = failures + 1 if time.monotonic() - since < 1.0 else 0
            time.sleep(
                min(0.1 * failures, 2.0)
            )  # one that dies again and again shall not take the whole core
            started[fork(worker, run_worker)] = (worker, time.monotonic())


def any_ready(board: Board) -> bool:
    return any(board.fixed(worker)[READY] for worker in range(board.workers))


def fork(worker: int, run_worker: Callable[[int], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
        run_worker(worker)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        write(log_line("error", "worker_failed", worker=worker, problem=repr(error)[:500]))
    finally:
        os._exit(code)


def reap() -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found.append((pid, status))


def stop(started: dict[int, tuple[int, float]], patience: float) -> int:
    for pid in started:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while started and time.monotonic() < deadline:
        for pid, _ in reap():
            started.pop(pid, None)
        time.sleep(0.02)
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    return 0
