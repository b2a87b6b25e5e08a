"""The model that a worker answers with, and how all workers change to another one together.

A worker asks before each request whether the pointer has changed (one `stat`, 1.5 µs) and loads what it points to before
it answers. So no request that begins after a swap was acknowledged is answered by the old model, even in a worker that
has started since, and none is answered by two.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.errors import UserError
from ml.serve.board import FAILED, GENERATION, Board
from ml.serve.model import BATCH, Bundle, Model, Refused, load
from ml.serve.problems import busy
from ml.serve.state import Pointer, State
from ml.serve.store.base import NotFound, Store
from ml.serve.telemetry import Telemetry, alive

INLINE = 0.02  # seconds that a run may keep all other requests waiting; a slower model runs beside the loop
TRIAL_SECONDS = 60.0
SWAP_SECONDS = 30.0  # to go live in every worker


class Returned(UserError):
    """A worker could not take the new model, so all went back to the old one."""


@dataclass
class Batcher:
    """Requests that wait at the same moment go through the model together, without a timer."""

    model: Model
    note: Callable[[Model, NDArray[np.uint8], NDArray[np.float32]], None]
    most: int  # images that may wait
    waiting: deque[tuple[NDArray[np.uint8], "asyncio.Future[NDArray[np.float32]]"]] = field(
        default_factory=deque
    )
    images: int = 0
    scheduled: bool = False

    def __post_init__(self) -> None:
        self.inline = self.model.seconds_per_batch <= INLINE
        seconds = max(self.model.seconds_per_batch, 1e-9)
        self.batch = BATCH if self.inline else max(1, min(BATCH, int(BATCH * INLINE / seconds)))

    async def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, H, W) uint8 to (N, classes) float32. Raises Problem 503 when too many wait."""
        if len(images) <= self.batch:
            return await self.submit(images)
        # one after another, so that other requests come in between
        starts = range(0, len(images), self.batch)
        return np.concatenate([await self.submit(images[start : start + self.batch]) for start in starts])

    def submit(self, images: NDArray[np.uint8]) -> "asyncio.Future[NDArray[np.float32]]":
        if self.images + len(images) > self.most:
            raise busy("Too many images are waiting for the model.")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[NDArray[np.float32]] = loop.create_future()
        self.waiting.append((images, future))
        self.images += len(images)
        if not self.scheduled:
            self.scheduled = True
            loop.call_soon(self.run)
        return future

    def run(self) -> None:
        taken, count = [], 0
        while self.waiting and count + len(self.waiting[0][0]) <= self.batch:
            entry = self.waiting.popleft()
            count += len(entry[0])
            if not entry[1].cancelled():
                taken.append(entry)
        self.images -= count
        if not taken:
            self.go_on()
            return
        images = taken[0][0] if len(taken) == 1 else np.concatenate([each[0] for each in taken])
        if self.inline:
            try:
                self.hand_out(taken, images, self.model.predict(images))
            except Exception as error:  # ONNX Runtime's: of these images, or of memory
                fail(taken, error)
            self.go_on()
        else:
            running = asyncio.get_running_loop().run_in_executor(None, self.model.predict, images)
            running.add_done_callback(lambda done: self.finish(taken, images, done))

    def finish(
        self, taken: list[Any], images: NDArray[np.uint8], done: "asyncio.Future[NDArray[np.float32]]"
    ) -> None:
        error = done.exception()
        if error is None:
            self.hand_out(taken, images, done.result())
        else:
            fail(taken, error)
        self.go_on()

    def hand_out(self, taken: list[Any], images: NDArray[np.uint8], found: NDArray[np.float32]) -> None:
        first = 0
        for part, future in taken:
            if not future.done():
                future.set_result(found[first : first + len(part)])
            first += len(part)
        self.note(self.model, images, found)

    def go_on(self) -> None:
        if self.waiting:
            asyncio.get_running_loop().call_soon(self.run)
        else:
            self.scheduled = False


def fail(taken: list[Any], error: BaseException) -> None:
    for _, future in taken:
        if not future.done():
            future.set_exception(error)


class LiveModel:
    """Of one worker. `batcher` is what answers; `refresh` it when `changed`."""

    def __init__(
        self, state: State, telemetry: Telemetry, most_waiting: int, longest_wait: float = 10.0
    ) -> None:
        self.state, self.telemetry, self.most_waiting = state, telemetry, most_waiting
        self.longest_wait = longest_wait  # seconds
        self.pointer_file = str(state.pointer_file)
        self.seen = -1
        self.generation = 0
        self.loading: asyncio.Task[None] | None = None
        self.batcher: Batcher

    def changed(self) -> bool:
        try:  # State.stamp, without what pathlib costs
            return os.stat(self.pointer_file).st_mtime_ns != self.seen
        except OSError:
            return self.seen != 0

    def start(self) -> None:
        """Load what the pointer points to. Raises UserError when it cannot."""
        stamp = self.state.stamp()
        pointer = self.state.read()
        if pointer is None:
            raise NotFound(f"{self.state.pointer_file} points to no model.")
        self.take(pointer, self.load(pointer))
        self.seen = stamp

    async def refresh(self) -> None:
        """Change to what the pointer points to now; all requests that find it changed wait for one loading."""
        if self.loading is None:
            self.loading = asyncio.create_task(self.reload())
            self.loading.add_done_callback(self.loaded)
        await asyncio.shield(self.loading)

    def loaded(self, task: "asyncio.Task[None]") -> None:
        self.loading = None
        if not task.cancelled() and task.exception() is not None:
            self.telemetry.log("error", "reload", problem=repr(task.exception()))

    async def reload(self) -> None:
        stamp = self.state.stamp()
        pointer = self.state.read()
        if pointer is None or pointer.generation == self.generation:
            self.seen = stamp  # gone, torn, or only touched: what is live stays
            return
        try:
            model = await asyncio.to_thread(self.load, pointer)
        except (UserError, OSError, MemoryError) as error:
            self.telemetry.fixed[FAILED] = pointer.generation
            self.telemetry.log("error", "model_refused", tag=pointer.tag, problem=str(error))
        else:
            self.take(pointer, model)
        self.seen = stamp

    def load(self, pointer: Pointer) -> Model:
        return load(self.state.bundle(pointer.digest, pointer.tag))

    def take(self, pointer: Pointer, model: Model) -> None:
        in_time = int(BATCH * self.longest_wait / max(model.seconds_per_batch, 1e-9))
        self.batcher = Batcher(model, self.telemetry.note, max(BATCH, min(self.most_waiting, in_time)))
        self.generation = pointer.generation
        self.telemetry.set_model(model)
        self.telemetry.fixed[GENERATION] = pointer.generation
        self.telemetry.log("info", "model_live", tag=model.tag, generation=pointer.generation)


@dataclass(frozen=True)
class Swap:
    tag: str
    previous: str | None
    changed: bool
    dry_run: bool
    sha256: str  # of model.onnx
    workers: int  # that answer with it
    checks: list[str]
    seconds: float


CHECKS = ["files", "size", "sha256", "shapes", "finite", "golden"]


def trial(bundle: Bundle) -> None:
    """Load the model in a process of its own, with limits, so that one that crashes or grows takes nobody with it.

    Raises Refused.
    """
    command = [sys.executable, "-m", "ml.serve.trial", str(bundle.folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TRIAL_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Refused(
            "golden", f"The model needs more than {TRIAL_SECONDS:.0f} s for its golden images."
        ) from None
    if done.returncode == 0:
        return
    check, _, message = done.stdout.strip().rpartition("\n")[2].partition(" ")
    if done.returncode == 1 and check in CHECKS:
        raise Refused(check, message)
    raise Refused("golden", f"The model ended the process that tried it (exit code {done.returncode}).")


def replace_model(
    state: State, store: Store, board: Board, tag: str, model_sha256: str | None = None, dry_run: bool = False
) -> Swap:
    """Make the model `tag` live in every worker of this server. Runs in a thread: it waits for the workers.

    Raises:
        NotFound, Unavailable, Refused, Busy: nothing has changed.
        Returned: a worker failed to load it; the old model is live again everywhere.
    """
    started = time.monotonic()
    with state.lock(SWAP_SECONDS):
        bundle, digest = state.install(store, tag, model_sha256)
        try_once(state, bundle, digest)
        return go_live(state, board, bundle, digest, dry_run, started)


def roll_back(state: State, board: Board, dry_run: bool = False) -> Swap:
    """Return to the model that was live before. Raises NotFound when there was none, else as `replace_model`."""
    started = time.monotonic()
    with state.lock(SWAP_SECONDS):
        pointer = state.read()
        if pointer is None or pointer.previous_tag is None or pointer.previous_digest is None:
            raise NotFound("No model was live before this one.")
        bundle = state.bundle(pointer.previous_digest, pointer.previous_tag)
        return go_live(state, board, bundle, pointer.previous_digest, dry_run, started)


def try_once(state: State, bundle: Bundle, digest: str) -> None:
    if not state.is_tried(digest):
        trial(bundle)
        state.set_tried(digest)


def go_live(state: State, board: Board, bundle: Bundle, digest: str, dry_run: bool, started: float) -> Swap:
    before = state.read()
    if not dry_run:
        pointer = state.publish(bundle.experiment.tag, digest)
        if not everywhere(board, pointer.generation):
            if before is not None:
                back = Pointer(
                    pointer.generation + 1,
                    before.tag,
                    before.digest,
                    before.previous_tag,
                    before.previous_digest,
                )
                state.write(back)
                everywhere(board, back.generation)
            raise Returned(
                f"A worker could not load {bundle.experiment.tag} (the log says why); "
                f"{before.tag if before else 'no model'} is live again."
            )
        state.forget_old()
    return Swap(
        tag=bundle.experiment.tag,
        previous=before.tag if before else None,
        changed=not dry_run and (before is None or before.digest != digest),
        dry_run=dry_run,
        sha256=bundle.experiment.model.sha256,
        workers=len(alive(board)),
        checks=CHECKS,
        seconds=round(time.monotonic() - started, 3),
    )


def everywhere(board: Board, generation: int) -> bool:
    """Wait until every worker answers with this generation; False as soon as one has failed to load it, or is late.

    A worker that dies meanwhile is started again, and loads what the pointer says before it takes requests.
    """
    deadline = time.monotonic() + SWAP_SECONDS
    while time.monotonic() < deadline:
        workers = [board.fixed(worker) for worker in alive(board)]
        if any(worker[FAILED] == generation for worker in workers):
            return False
        if all(worker[GENERATION] >= generation for worker in workers):
            return True
        time.sleep(0.002)
    return False


async def follow(live: LiveModel, seconds: float = 0.02) -> None:
    """For a worker that nobody sends requests to: look at the pointer now and then, so that a swap need not wait."""
    while True:
        await asyncio.sleep(seconds)
        if live.changed():
            try:
                await live.refresh()
            except Exception as error:  # logged by `loaded`; this task must go on
                live.telemetry.log("error", "follow", problem=repr(error))


def start_from(state: State, store: Store, tag: str | None) -> Pointer:
    """Publish the model to begin with, unless the folder already points to one that is whole.

    Raises UserError when there is no model that passes the checks.
    """
    state.folder.mkdir(parents=True, exist_ok=True)
    with state.lock(SWAP_SECONDS):
        pointer = state.read()
        if pointer is not None:
            try:
                state.bundle(pointer.digest, pointer.tag)
                return pointer
            except UserError:
                pass
        bundle, digest = state.install(store, tag or store.newest())
        return state.publish(bundle.experiment.tag, digest)


def folder_of(path: Path | None) -> Path:
    """SERVE_STATE, or a folder of its own that the caller removes."""
    if path is None:
        import tempfile

        return Path(tempfile.mkdtemp(prefix="ml-serve-"))
    return path
