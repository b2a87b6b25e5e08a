"""A bundle that has passed every check, ready to answer.

The checks come in this order, so that nothing is parsed that could have been refused before:
plain files → size → sha256 → names, shapes, types → finite → golden images.
"""

import io
import mmap
import os
import stat
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml import files
from ml.bundle import EXPERIMENT, EXPERIMENT_LIMIT, GOLDEN, MODEL, Experiment, parse_experiment
from ml.errors import UserError
from ml.files import Golden
from ml.serve import onnx_file
from ml.serve.images import SMALLEST

TOLERANCE = 1e-4  # largest difference of a probability from the golden one
GOLDEN_LIMIT = 2**26  # bytes of the golden images and answers
BATCH = 64  # images in one run, so that memory and the time between two answers stay bounded
MEMBERS = (EXPERIMENT, MODEL, GOLDEN)


class Refused(UserError):
    """A model that must not go live; `check` is the one that it failed."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check


@dataclass(frozen=True)
class Bundle:
    """Files of one model; `folder` is ours alone, so what was checked is what is loaded."""

    folder: Path
    experiment: Experiment

    @property
    def shape(self) -> tuple[int, int]:
        return self.experiment.image_height, self.experiment.image_width


@dataclass(frozen=True)
class Model:
    """predict: images (N, H, W) uint8 to probabilities (N, classes) float32."""

    experiment: Experiment
    predict: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    seconds_per_batch: float  # that a run of BATCH images took
    dark_background: bool  # whether the border of the golden images is dark, as that of MNIST is

    @property
    def tag(self) -> str:
        return self.experiment.tag


def open_plain(path: Path) -> int:
    """A descriptor of a regular file. Raises Refused for anything else: a link, a pipe, a folder, nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Refused("files", f"{path.name} cannot be read as a plain file: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused("files", f"{path.name} is not a plain file.")
    return descriptor


def read_plain(path: Path, limit: int) -> bytes:
    with open(open_plain(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise Refused("size", f"{path.name} has more than the {limit:,} bytes that it may have.")
    return content


def check_bundle(folder: Path, limit: int, tag: str | None = None, model_sha256: str | None = None) -> Bundle:
    """All checks that need no ONNX Runtime. `limit`: bytes of the model; `tag`, `model_sha256`: what it must be.

    Raises:
        Refused: naming the check that failed.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Refused("files", f"{folder.name} is not a folder.")
    content = read_plain(folder / EXPERIMENT, EXPERIMENT_LIMIT)
    try:
        experiment = parse_experiment(content, EXPERIMENT)
    except UserError as error:
        raise Refused("files", str(error)) from None
    if tag is not None and experiment.tag != tag:
        raise Refused("files", f"{EXPERIMENT} is that of {experiment.tag}, not of {tag}.")
    for name, described, most in (
        (MODEL, experiment.model, limit),
        (GOLDEN, experiment.golden, GOLDEN_LIMIT),
    ):
        with open(open_plain(folder / name), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most or described.size > most:
                raise Refused("size", f"{name} has {max(size, described.size):,} bytes; at most {most:,}.")
            if size != described.size:
                raise Refused("size", f"{name} has {size:,} bytes; {EXPERIMENT} says {described.size:,}.")
    for name, described in ((MODEL, experiment.model), (GOLDEN, experiment.golden)):
        found = files.sha256(folder / name)
        if found != described.sha256:
            raise Refused("sha256", f"{name} has sha256 {found}; {EXPERIMENT} says {described.sha256}.")
    if model_sha256 is not None and model_sha256 != experiment.model.sha256:
        raise Refused("sha256", f"{MODEL} has sha256 {experiment.model.sha256}; asked for {model_sha256}.")
    bundle = Bundle(folder, experiment)
    check_onnx(bundle)
    return bundle


def check_onnx(bundle: Bundle) -> None:
    with (
        open(bundle.folder / MODEL, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        problem: Refused | None = None
        whole = memoryview(data)
        try:
            found: onnx_file.OnnxFile | None = onnx_file.parse(whole)
            assert found is not None
            problem = wrong_interface(found, bundle.experiment)
            if problem is None:
                try:
                    found.check_values()
                except onnx_file.Malformed as error:
                    problem = Refused("finite", f"{MODEL} {error}.")
        except onnx_file.Malformed as error:
            problem = Refused("shapes", f"{MODEL} {error}.")
        if problem is not None:
            problem = Refused(problem.check, str(problem))  # without the traceback, which would hold the map
        found = None
        try:
            whole.release()
            data.close()
        except BufferError:
            pass  # a view is still held by an exception: the garbage collector closes the map
    if problem is not None:
        raise problem


def wrong_interface(found: onnx_file.OnnxFile, experiment: Experiment) -> Refused | None:
    height, width, classes = experiment.image_height, experiment.image_width, len(experiment.class_names)
    wanted = (
        ("input", found.inputs, "images", onnx_file.UINT8, (height, width)),
        ("output", found.outputs, "probabilities", onnx_file.FLOAT, (classes,)),
    )
    for kind, ports, name, element, dims in wanted:
        if len(ports) != 1 or ports[0].name != name or ports[0].element != element:
            have = ", ".join(f"{port.name[:60]!r} of type {port.element}" for port in ports[:5]) or "none"
            return Refused("shapes", f"{MODEL} must have one {kind} {name!r} of type {element}, has {have}.")
        shape = ports[0].dims
        if shape is None and kind == "output":
            continue  # the golden images tell
        if shape is None or len(shape) != len(dims) + 1:
            return Refused("shapes", f"{kind} {name!r} of {MODEL} has shape {shape}, not (batch, {dims}).")
        frozen = shape[0] is not None and kind == "input"
        if frozen or any(have is not None and have != want for have, want in zip(shape[1:], dims)):
            return Refused(
                "shapes", f"{kind} {name!r} of {MODEL} has shape {shape}; {EXPERIMENT} says (any, {dims})."
            )
    return None


def read_golden(bundle: Bundle) -> Golden:
    try:
        content = read_plain(bundle.folder / GOLDEN, GOLDEN_LIMIT)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > GOLDEN_LIMIT:
                raise ValueError("grows beyond what it may")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            golden = Golden(arrays["images"], arrays["probabilities"])
    except files.UNREADABLE as error:
        raise Refused("golden", f"{GOLDEN} is not a file of golden images ({error}).") from None
    images, expected = golden.images, golden.probabilities
    classes = len(bundle.experiment.class_names)
    if images.dtype != np.uint8 or images.shape[1:] != bundle.shape or not 1 <= len(images) <= 4096:
        raise Refused(
            "golden",
            f"{GOLDEN} has images {images.shape} {images.dtype}; wanted (1…4096, {bundle.shape}) uint8.",
        )
    if (
        expected.shape != (len(images), classes)
        or expected.dtype.kind != "f"
        or not np.isfinite(expected).all()
    ):
        raise Refused("golden", f"{GOLDEN} has no finite answers of shape ({len(images)}, {classes}).")
    if not (np.abs(expected.sum(1) - 1) < 1e-2).all() or (expected < 0).any():
        raise Refused("golden", f"{GOLDEN} has answers that are no probabilities.")
    return golden


def start_session(path: Path) -> Any:
    """An ONNX Runtime session on one thread that does not spin: a worker has one core, and others need theirs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own, one class for each status
        raise Refused("shapes", f"ONNX Runtime does not load {MODEL}: {str(error)[:300]}") from None


def load(bundle: Bundle) -> Model:
    """Start ONNX Runtime and answer the golden images, which also warms it up.

    Raises:
        Refused: it does not load, or answers otherwise than it must.
    """
    golden = read_golden(bundle)
    session = start_session(bundle.folder / MODEL)
    run, outputs = session.run, ["probabilities"]

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        (probabilities,) = run(outputs, {"images": images})
        found: NDArray[np.float32] = probabilities
        return found

    try:
        parts = [
            predict(golden.images[first : first + BATCH]) for first in range(0, len(golden.images), BATCH)
        ]
        answers = np.concatenate(parts)
        one = predict(golden.images[:1])
        seconds = time_of_a_batch(predict, golden.images)
    except Exception as error:
        raise Refused("golden", f"{MODEL} fails on its golden images: {str(error)[:300]}") from None
    for found, wanted in ((answers, golden.probabilities), (one, golden.probabilities[:1])):
        if found.shape != wanted.shape or found.dtype != np.float32:
            raise Refused(
                "golden", f"{MODEL} gives {found.shape} {found.dtype} for {wanted.shape} golden answers."
            )
        difference = float(np.abs(found - wanted).max())
        if not difference <= TOLERANCE:  # also when it is not a number
            raise Refused(
                "golden",
                f"{MODEL} differs from its golden answers by {difference:.2e} (allowed: {TOLERANCE:.0e}).",
            )
    return Model(bundle.experiment, predict, seconds, has_dark_border(golden.images))


def time_of_a_batch(predict: Callable[[NDArray[np.uint8]], Any], images: NDArray[np.uint8]) -> float:
    """Seconds of processor time for BATCH images, the best of three: what else the machine does shall not count."""
    batch = images[np.arange(min(BATCH, len(images)))]
    times = []
    for _ in range(3):
        started = time.thread_time()
        predict(batch)
        times.append(time.thread_time() - started)
    return min(times) * BATCH / len(batch)


def has_dark_border(images: NDArray[np.uint8]) -> bool:
    """Whether nearly all of the model's own images lie on a dark background: only then is a light one inverted."""
    if min(images.shape[1:]) < SMALLEST:
        return False  # a few measurements, not a picture
    border = np.concatenate([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], axis=1)
    return bool((border < 64).mean() > 0.9)
