"""Bundles of small real models, and real servers (`python -m ml.serve`) to ask."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import requests

ROOT = Path(__file__).parents[1]
SIZE = 28
DIGITS = [str(number) for number in range(10)]
TOKEN = "a-token-of-the-tests"


def make_images(count: int = 256, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Light bars and blobs on black, (count, 28, 28) uint8: enough to tell ten classes apart."""
    random = np.random.default_rng(seed)
    images = np.zeros((count, SIZE, SIZE), np.uint8)
    for index in range(count):
        kind = index % 10
        row, column = random.integers(2, 5, 2)
        images[index, 4 + kind : 7 + kind, column : column + 20] = random.integers(180, 256)
        images[index, row : row + 20, 4 + 2 * kind : 6 + 2 * kind] = random.integers(180, 256)
    return images


def make_bundle(
    folder: Path,
    tag: str,
    seed: int = 0,
    created: str = "2026-01-01T00:00:00Z",
    accuracy: float = 0.9,
    **replaced: Any,
) -> Path:
    """`folder`/`tag`: MiniCNN with weights of `seed`, exported as the train stage does, with its golden answers."""
    import torch

    from ml import files
    from ml.export import export_onnx, export_program, golden
    from ml.task.model import MiniCNN

    torch.manual_seed(seed)
    images = make_images()
    model = MiniCNN(SIZE, 10, (4, 8), 0.13, 0.31).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        loss = torch.nn.functional.nll_loss(model(torch.from_numpy(images)), torch.arange(len(images)) % 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target = folder / tag
    target.mkdir(parents=True)
    (target / "model.onnx").write_bytes(export_onnx(export_program(model, images[:64]), model, images[:64]))
    files.save_arrays(target / "golden.npz", **vars(golden(model, images[:20])))
    write_experiment(target, tag=tag, created=created, metrics={"accuracy": {"mean": accuracy}}, **replaced)
    return target


def make_variant(bundle: Path, tag: str, created: str) -> Path:
    """A second model beside `bundle`: the same network with weights a little smaller, and slightly less accurate."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(0.98), tensor.name)
            )
    target = bundle.parent / tag
    target.mkdir()
    (target / "model.onnx").write_bytes(model.SerializeToString())
    write_golden(target)
    write_experiment(target, created=created, metrics={"accuracy": {"mean": 0.95}})
    return target


def make_flat_bundle(folder: Path, tag: str) -> Path:
    """`folder`/`tag`: a model of four measurements, images (1, 4), as that of examples/iris is."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    from ml import files

    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32) / 50
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["rows"], axis=1),
        helper.make_node("MatMul", ["rows", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "flat",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 1, 4])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(weights, "weights")],
    )
    target = folder / tag
    target.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
        target / "model.onnx",
    )
    images = np.random.default_rng(1).integers(0, 256, (20, 1, 4)).astype(np.uint8)
    session = onnxruntime.InferenceSession(str(target / "model.onnx"))
    (probabilities,) = session.run(None, {"images": images})
    files.save_arrays(target / "golden.npz", images=images, probabilities=probabilities)
    write_experiment(target, class_names=["setosa", "versicolor", "virginica"], image_height=1, image_width=4)
    return target


def write_experiment(target: Path, **replaced: Any) -> None:
    """experiment.json for the two files that lie in `target`; keywords replace members."""
    from ml import files

    described = {
        name: {"sha256": files.sha256(target / file), "size": (target / file).stat().st_size}
        for name, file in (("model", "model.onnx"), ("golden", "golden.npz"))
    }
    experiment = {
        "version": 1,
        "tag": target.name,
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "created": "2026-01-01T00:00:00Z",
        "dataset": "bars",
        "data_hash": "d41d8cd98f00b204e9800998ecf8427e.dir",
        "lock_sha256": "0" * 64,
        "class_names": DIGITS,
        "image_height": SIZE,
        "image_width": SIZE,
        "metrics": {},
        "params": {"train": {"epochs": 1}},
        **described,
        **replaced,
    }
    (target / "experiment.json").write_text(json.dumps(experiment, indent=2))


def png(image: "np.ndarray[Any, Any]", kind: str = "PNG", **options: Any) -> bytes:
    from PIL import Image

    file = BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


@dataclass
class Served:
    process: "subprocess.Popen[str]"
    address: str
    state: Path
    log: list[str] = field(default_factory=list)
    session: requests.Session = field(default_factory=requests.Session)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.address + path, timeout=30, **options)

    def post(self, path: str, *arguments: Any, **options: Any) -> requests.Response:
        return self.session.post(self.address + path, *arguments, timeout=60, **options)

    def swap(self, tag: str, token: str = TOKEN, **more: Any) -> requests.Response:
        return self.post(
            "/replace_ml_model", json={"tag": tag, **more}, headers={"Authorization": f"Bearer {token}"}
        )

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples with this name and these labels."""
        total = 0.0
        for line in self.get("/metrics").text.splitlines():
            found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if found and found[1] == name:
                given = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
                if labels.items() <= given.items():
                    total += float(found[3])
        return total

    def events(self, event: str) -> list[dict[str, Any]]:
        found = []
        for line in list(self.log):
            with suppress(json.JSONDecodeError):  # a worker that was killed may have left half a line
                found.append(json.loads(line))
        return [each for each in found if each["event"] == event]

    def pids(self) -> list[int]:
        """Of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children] or [self.process.pid]


@contextmanager
def served(models: Path | str, state: Path, ready: float = 30.0, **environment: str) -> Iterator[Served]:
    """A server of its own process on a free port; ends with SIGTERM."""
    state.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SERVE_", "MODEL_"))}
    settings = {"PORT": "0", "SERVE_TOKEN": TOKEN, "SERVE_DRAIN": "0", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "ml.serve"],
        env=clean | settings | {"MODEL_STORE": str(models), "SERVE_STATE": str(state)},
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + ready
        while not any('"event": "listening"' in line for line in list(log)):
            assert process.poll() is None and time.monotonic() < deadline, "".join(log)
            time.sleep(0.01)
        port = next(json.loads(line)["port"] for line in log if '"listening"' in line)
        server = Served(process, f"http://127.0.0.1:{port}", state, log)
        while True:
            try:
                if server.get("/ready").status_code == 200:
                    break
            except requests.ConnectionError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, "".join(log)
            time.sleep(0.01)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(25)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        finally:
            reader.join(5)
            assert process.stderr is not None
            process.stderr.close()


def onnx_model(
    values: "np.ndarray[Any, Any] | None" = None,
    input_type: int = 2,
    input_shape: tuple[Any, ...] = ("batch", SIZE, SIZE),
    input_name: str = "images",
    output_name: str = "probabilities",
    classes: int = 10,
    external: bool = False,
) -> bytes:
    """A linear layer and a softmax; keywords make it wrong."""
    from onnx import TensorProto, helper, numpy_helper

    if values is None:
        values = np.random.default_rng(0).normal(0, 0.01, (SIZE * SIZE, classes)).astype(np.float32)
    weight = numpy_helper.from_array(values, "weight")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "../../../../etc/passwd"), ("length", "31360")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("Cast", [input_name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
        helper.make_node("Softmax", ["scores"], [output_name], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(input_name, input_type, input_shape)],
        [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, ("batch", classes))],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def write_golden(target: Path, shift: float = 0.0, **replaced: Any) -> None:
    """What ONNX Runtime says of model.onnx in `target`, moved by `shift`."""
    import onnxruntime

    images = make_images(8)
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: images})
    arrays = {"images": images, "probabilities": np.abs(answers - np.float32(shift))} | replaced
    np.savez(target / "golden.npz", **arrays)


def hostile_models(folder: Path, good: Path) -> dict[str, str]:
    """Bundles in `folder` that must be refused: tag → the check that has to refuse it."""
    import pickle
    import shutil

    def copy(tag: str) -> Path:
        target = folder / tag
        shutil.copytree(good, target)
        return target

    def with_model(tag: str, content: bytes, own_golden: bool = False) -> Path:
        target = copy(tag)
        (target / "model.onnx").write_bytes(content)
        if own_golden:
            write_golden(target)
        write_experiment(target)
        return target

    whole = (good / "model.onnx").read_bytes()
    infinite = np.zeros((SIZE * SIZE, 10), np.float32)
    infinite[5, 5] = np.inf
    with_model("pickle", pickle.dumps({"weights": [1.0] * 100}))
    with_model("empty-graph", b"\x08\x09\x3a\x00")
    with_model("truncated", whole[: len(whole) // 2])
    with_model("noise", np.random.default_rng(1).bytes(5000))
    with_model("huge-header", b"\x08\x09\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + whole)
    with_model("deep", b"\x08\x09" + nested(3000))
    with_model("external-data", onnx_model(external=True))
    with_model("wrong-name", onnx_model(input_name="pixels"))
    with_model("wrong-type", onnx_model(input_type=1))
    with_model("wrong-shape", onnx_model(input_shape=("batch", SIZE, SIZE - 1)))
    with_model("frozen-batch", onnx_model(input_shape=(1, SIZE, SIZE)))
    with_model("wrong-classes", onnx_model(classes=9))
    with_model("not-a-number", onnx_model(np.full((SIZE * SIZE, 10), np.nan, np.float32)))
    with_model("infinite", onnx_model(infinite))
    with_model("shape-lies", with_dims(onnx_model(), (SIZE * SIZE, 2**40)))
    with_model("other-weights", onnx_model())
    with_model("trailing-bytes", whole + bytes(1000))
    target = copy("longer-than-said")
    write_experiment(target)
    (target / "model.onnx").write_bytes(whole + b"x")
    target = copy("flipped")
    write_experiment(target)
    (target / "model.onnx").write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    target = copy("linked-model")
    (target / "model.onnx").unlink()
    (target / "model.onnx").symlink_to(good / "model.onnx")
    (folder / "linked-folder").symlink_to(good, target_is_directory=True)
    target = copy("no-golden")
    (target / "golden.npz").unlink()
    target = copy("pickled-golden")
    np.savez(target / "golden.npz", images=np.array([{"a": 1}], object), probabilities=np.ones((1, 10)))
    write_experiment(target)
    target = copy("other-tag")
    write_experiment(target, tag="model-v1.0.0")
    target = copy("no-json")
    (target / "experiment.json").write_text("{" * 100_000)
    target = copy("pipe")
    (target / "model.onnx").unlink()
    os.mkfifo(target / "model.onnx")
    return {
        "pickle": "shapes",
        "empty-graph": "shapes",
        "truncated": "shapes",
        "noise": "shapes",
        "huge-header": "shapes",
        "deep": "shapes",
        "external-data": "finite",
        "wrong-name": "shapes",
        "wrong-type": "shapes",
        "wrong-shape": "shapes",
        "frozen-batch": "shapes",
        "wrong-classes": "shapes",
        "not-a-number": "finite",
        "infinite": "finite",
        "shape-lies": "finite",
        "other-weights": "golden",
        "trailing-bytes": "shapes",
        "longer-than-said": "size",
        "flipped": "sha256",
        "linked-model": "files",
        "linked-folder": "files",
        "no-golden": "files",
        "pickled-golden": "golden",
        "other-tag": "files",
        "no-json": "files",
        "pipe": "files",
    }


def with_dims(model: bytes, dims: tuple[int, ...]) -> bytes:
    """The model with a constant that says it had another shape."""
    import onnx

    parsed = onnx.load_from_string(model)
    parsed.graph.initializer[0].dims[:] = dims
    content: bytes = parsed.SerializeToString()
    return content


def nested(depth: int) -> bytes:
    """A graph whose node has a graph whose node has a graph …"""

    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)
