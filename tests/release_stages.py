"""Stages of a small project: `python -m tests.release_stages STAGE`.

A model whose weights follow from the data and the params, made in a moment. RELEASE_NOISE in the environment makes
training give something else.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from ml import files
from ml.files import Examples, Golden, Predictions

CLASSES = ("cat", "dog", "owl")
HEIGHT, WIDTH = 4, 5


def params() -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(Path("params.yaml").read_text())
    return found


def load() -> None:
    raw = Path("data/raw.bin").read_bytes()
    random = np.random.default_rng(list(raw[:16]))
    for path, count in ((files.TRAIN_EXAMPLES, 30), (files.TEST_EXAMPLES, 60)):
        images = random.integers(0, 256, (count, HEIGHT, WIDTH)).astype(np.uint8)
        ids = np.array([f"{path.stem}{number:011x}" for number in range(count)])
        labels = np.arange(count, dtype=np.int64) % len(CLASSES)
        files.save_examples(path, Examples(images, labels, ids, np.array(CLASSES)))
    per_class = {name: 10 for name in CLASSES}
    summary = {
        "dataset": "custom",
        "class_names": CLASSES,
        "image_height": HEIGHT,
        "image_width": WIDTH,
        "train": {"examples": 30, "per_class": per_class},
        "test": {"examples": 60, "per_class": {name: 20 for name in CLASSES}},
        "images_in_both_parts": 0,
    }
    files.write_json(files.DATA_SUMMARY, summary)


def train() -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    examples = files.load_examples(files.TRAIN_EXAMPLES)
    noise = len(os.environ.get("RELEASE_NOISE", ""))
    random = np.random.default_rng([params()["train"]["epochs"], noise])
    weights = random.normal(0, 0.01, (HEIGHT * WIDTH, len(CLASSES))).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("Cast", ["flat"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["pixels", "weights"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
        ],
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", HEIGHT, WIDTH])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(CLASSES)])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    files.write_bytes(files.MODEL_ONNX, onnx.ModelProto.SerializeToString(model))
    files.save_weights(files.MODEL_WEIGHTS, {"weights": weights})
    session = onnxruntime.InferenceSession(files.MODEL_ONNX.read_bytes())
    images = examples.images[:8]
    (probabilities,) = session.run(["probabilities"], {"images": images})
    files.save_golden(Golden(images, probabilities))
    made_with = {"torch": "2.0", "device": os.environ.get("RELEASE_DEVICE", "cpu"), "threads": 1}
    files.write_json(files.TRAINING, {"chosen_seed": 0, "weights": weights.size, "made_with": made_with})


def evaluate() -> None:
    test = files.load_examples(files.TEST_EXAMPLES)
    model = int(files.md5(files.MODEL_ONNX)[:8], 16)
    seeds = np.arange(2)
    random = np.random.default_rng(model)
    taken_for = (test.labels + (random.random((len(seeds), len(test))) < 0.1)) % len(CLASSES)
    probabilities = np.full((len(seeds), len(test), len(CLASSES)), 0.1, np.float32)
    np.put_along_axis(probabilities, taken_for[:, :, None], 0.8, axis=2)
    files.save_predictions(Predictions(test.ids, test.labels, seeds, probabilities))
    accuracy = float((taken_for == test.labels).mean())
    metrics = {
        name: {"mean": accuracy, "low": 0.5, "high": 1.0, "seed_std": 0.0} for name in ("accuracy", "loss")
    }
    files.write_json(files.METRICS, metrics)


if __name__ == "__main__":
    {"load": load, "train": train, "evaluate": evaluate}[sys.argv[1]]()
