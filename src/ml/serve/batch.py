"""A folder of images to a CSV: `python -m ml.serve.batch FOLDER --to out.csv`. The model is found as the server finds it.

One row for each image, in the order of the paths, by the decoding and the model that /predict uses; a file that is no
image gets a row that says why. Interrupted or killed, the same command goes on where it was: what is done lies in
out.csv.part, which becomes out.csv when it is whole.
"""

import argparse
import csv
import fcntl
import io
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ml.bundle import Experiment
from ml.errors import UserError, exit_on_user_error
from ml.progress import progress
from ml.serve.images import Picture, Target, decode
from ml.serve.live_model import folder_of, start_from
from ml.serve.model import BATCH, Bundle, Model, load
from ml.serve.problems import Problem
from ml.serve.settings import ServeSettings, load_settings
from ml.serve.state import State
from ml.serve.store.base import open_store

CHUNK = 256  # files that a worker takes at a time, or fewer where they are large:
CHUNK_BYTES = 2**22
AHEAD = (
    4  # chunks a worker that may be under way, so that a slow one does not let the others' answers pile up
)
SHOWN = 10  # bad files named at the end
FIRST, LAST = ("file", "image", "class", "probability"), ("model", "done", "error")


def printable(text: str) -> str:
    """Control characters, bytes that are no UTF-8 and backslashes as escapes: a row of the CSV is always one line."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        each if each.isprintable() and each != "\\" else each.encode("unicode_escape").decode()
        for each in text
    )


def csv_line(values: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def header(experiment: Experiment) -> str:
    return csv_line([*FIRST, *(f"p_{printable(name)}" for name in experiment.class_names), *LAST])


def list_files(folder: Path, without: set[Path]) -> list[str]:
    """Paths relative to `folder` of all files below it, sorted; hidden ones, and `without`, left out."""
    found: list[str] = []

    def walk(prefix: str) -> None:
        with os.scandir(folder / prefix) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                path = f"{prefix}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    walk(f"{path}/")
                elif folder / path not in without:
                    found.append(path)

    try:
        walk("")
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from None
    return found


@dataclass(frozen=True)
class Worker:
    """What a process of the pool holds: the model, and how much it may be given."""

    model: Model
    target: Target
    folder: Path
    max_bytes: int

    def read(self, path: str) -> list[Picture]:
        """Raises Problem or OSError for what is no image."""
        descriptor = os.open(
            self.folder / path, os.O_RDONLY | os.O_NONBLOCK
        )  # a pipe must not keep us waiting
        with open(descriptor, "rb") as file:
            content = file.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise Problem(413, "too-large", f"The file has more than {self.max_bytes:,} bytes.")
        return decode(content, self.target)

    def rows(self, paths: list[str]) -> tuple[str, int, list[str]]:
        """CSV lines of these files, how many images they hold, and what is wrong with the bad ones."""
        names = [printable(name) for name in self.model.experiment.class_names]
        lines: list[str] = []
        waiting: list[tuple[str, int, Picture]] = []
        images = 0
        bad: list[str] = []

        def answer() -> None:
            probabilities = self.model.predict(np.stack([picture.pixels for _, _, picture in waiting]))
            best = probabilities.argmax(1)
            for (path, index, picture), row, chosen in zip(waiting, probabilities, best):
                values = [f"{value:.6g}" for value in row.tolist()]
                head = [printable(path), str(index), names[chosen], values[chosen]]
                lines.append(csv_line([*head, *values, self.model.tag, "; ".join(picture.done), ""]))
            waiting.clear()

        for path in paths:
            try:
                pictures = self.read(path)
            except (Problem, OSError) as error:
                problem = error.detail if isinstance(error, Problem) else f"{error.strerror or error}"
                if waiting:
                    answer()
                empty = [""] * (2 + len(names))
                lines.append(csv_line([printable(path), "0", *empty, self.model.tag, "", printable(problem)]))
                bad.append(f"{printable(path)}: {problem}")
                continue
            images += len(pictures)
            for index, picture in enumerate(pictures):
                waiting.append((path, index, picture))
                if len(waiting) == BATCH:
                    answer()
        if waiting:
            answer()
        return "".join(lines), images, bad


worker: Worker | None = None  # of this process of the pool


def start_worker(bundle: Bundle, folder: Path, settings: ServeSettings) -> None:
    """Load the model; end when the process that started this one does, whatever ended it."""
    global worker
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    model = load(bundle)
    target = Target(
        *bundle.shape, model.dark_background, settings.serve_max_pixels, settings.serve_max_images
    )
    worker = Worker(model, target, folder, settings.serve_max_body)


def end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def rows_of(paths: list[str]) -> tuple[str, int, list[str]]:
    assert worker is not None
    return worker.rows(paths)


def mend(file: BinaryIO, expected: str, tag: str, paths: list[str]) -> int:
    """Cut `file` after its last whole entry. Returns how many of `paths` are in it.

    A torn last line goes, and all rows of the last file, which may have lacked some.

    Raises:
        UserError: it was begun with another model, or of other files.
    """
    first = file.readline()
    if first != expected.encode():
        if first.endswith(b"\n"):
            raise UserError(f"{file.name} was begun with other classes. Remove it to begin anew.")
        file.seek(0)
        file.truncate()
        file.write(expected.encode())
        return 0
    done, start, last = -1, file.tell(), ""
    while (line := file.readline()).endswith(b"\n"):
        row = next(csv.reader([line.decode()]))
        if row[-3] != tag:
            raise UserError(
                f"{file.name} was begun with model {row[-3]}, this is {tag}. Remove it to begin anew."
            )
        if done < 0 or row[0] != last:
            done, start, last = done + 1, file.tell() - len(line), row[0]
            if done >= len(paths) or printable(paths[done]) != last:
                raise UserError(
                    f"{file.name} goes on with {last}, the folder does not: files were added or removed since it "
                    "was begun. Remove it to begin anew."
                )
    file.seek(start)
    file.truncate()
    return max(done, 0)


def chunks(folder: Path, paths: list[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for path in paths:
        chunk.append(path)
        with suppress(OSError):
            size += os.stat(folder / path).st_size
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def in_order(
    pool: ProcessPoolExecutor, most: int, work: Iterator[list[str]]
) -> Iterator[tuple[int, str, int, list[str]]]:
    """Files done, their lines, their images and what is bad, in the order of `work`; `most` chunks under way."""
    under_way: deque[tuple[int, Future[tuple[str, int, list[str]]]]] = deque()
    while True:
        while len(under_way) < most and (chunk := next(work, None)) is not None:
            under_way.append((len(chunk), pool.submit(rows_of, chunk)))
        if not under_way:
            return
        count, future = under_way.popleft()
        yield count, *future.result()


def predict_folder(folder: Path, to: Path, bundle: Bundle, settings: ServeSettings, processes: int) -> None:
    """Write the CSV, or the rest of it. Raises UserError when it cannot be, or when another run is writing it."""
    part = to.with_name(f"{to.name}.part")
    here = folder.resolve()
    paths = list_files(here, {to.resolve(), part.resolve()})
    images, many_bad = 0, 0
    bad: list[str] = []
    try:
        file = open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"{part} cannot be written: {error.strerror}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{part} is being written by another process. Wait for it, or end it.") from None
        done = mend(file, header(bundle.experiment), bundle.experiment.tag, paths)
        if done:
            print(f"going on after {done:,} of {len(paths):,} files", file=sys.stderr)
        pool = ProcessPoolExecutor(processes, get_context("spawn"), start_worker, (bundle, here, settings))
        try:
            with progress("batch", len(paths), "file", initial=done) as bar:
                work = chunks(here, paths[done:])
                for count, lines, found, problems in in_order(pool, AHEAD * processes, work):
                    file.write(lines.encode())
                    file.flush()
                    images, many_bad = images + found, many_bad + len(problems)
                    bad += problems[: SHOWN - len(bad)]
                    bar.update(count)
            os.fsync(file.fileno())
        except BrokenProcessPool:
            raise UserError(
                "A worker process was ended from outside, perhaps for want of memory. Run the same command again to "
                "go on, with a smaller --processes if it was memory."
            ) from None
        except OSError as error:
            raise UserError(
                f"{part} could not be written: {error.strerror}. Make room, then run the same command again."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
        os.replace(part, to)
    print(
        f"{to}: {images:,} images of {len(paths) - done - many_bad:,} files by {bundle.experiment.tag}",
        end="",
    )
    print(f", {many_bad:,} bad files:" if many_bad else "")
    print("".join(f"  {line}\n" for line in bad) + ("  …\n" if many_bad > len(bad) else ""), end="")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.serve.batch",
        description="Predict every image below a folder. The model is chosen by MODEL_STORE and MODEL_TAG.",
    )
    parser.add_argument("folder", type=Path, help="of PNG, JPEG, BMP, WebP, IDX or .npy files, at any depth")
    parser.add_argument("--to", type=Path, required=True, metavar="CSV", help="the file to write")
    parser.add_argument("--processes", type=int, help="that decode and predict (one for each core)")
    arguments = parser.parse_args()
    processes = arguments.processes or len(os.sched_getaffinity(0))
    if processes < 1:
        parser.error("--processes must be 1 or more")
    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder.")
    if not arguments.to.absolute().parent.is_dir() or arguments.to.is_dir():
        raise UserError(f"--to {arguments.to} must be a file in a folder that exists.")
    settings = load_settings()
    folder = folder_of(None)
    try:
        state = State(folder, settings.serve_max_model)
        pointer = start_from(state, open_store(settings, folder / "cache"), settings.model_tag)
        bundle = state.bundle(pointer.digest, pointer.tag)
        load(bundle)  # so that a model which is refused is refused here, and not in every process
        predict_folder(arguments.folder, arguments.to, bundle, settings, processes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    exit_on_user_error(main)
