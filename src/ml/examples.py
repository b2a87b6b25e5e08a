"""What every task's data have in common: two parts of examples with ids, and the facts of the data card."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml import files
from ml.files import Examples


@dataclass(frozen=True)
class Dataset:
    """`raw`: the files that it was read from."""

    train: Examples
    test: Examples
    raw: tuple[Path, ...]


def example_ids(images: NDArray[np.uint8]) -> NDArray[np.str_]:
    """(N,) ids: 16 hex digits of a hash of the pixels and their shape; the k-th repeat of an image ends in -k.

    The same image has the same id in every version of the data, so two results can be paired example by example,
    and a changed label is seen as a changed label.
    """
    prefix = f"{images.shape[1:]}".encode()
    seen: dict[str, int] = {}
    ids = []
    for image in np.ascontiguousarray(images):
        digest = hashlib.blake2b(prefix + image.tobytes(), digest_size=8).hexdigest()
        repeats = seen.get(digest, 0)
        seen[digest] = repeats + 1
        ids.append(f"{digest}-{repeats}" if repeats else digest)
    return np.array(ids)


def describe(dataset: Dataset, name: str) -> dict[str, Any]:
    """What the data card says: files, counts, classes, pixels, repeated images."""
    parts = {"train": dataset.train, "test": dataset.test}
    class_names = dataset.train.class_names.tolist()
    height, width = dataset.train.images.shape[1:]
    return {
        "dataset": name,
        "class_names": class_names,
        "image_height": height,
        "image_width": width,
        **{part: describe_part(examples, class_names) for part, examples in parts.items()},
        "images_in_both_parts": len(set(dataset.train.ids.tolist()) & set(dataset.test.ids.tolist())),
        "md5": {file.name: files.md5(file) for file in dataset.raw},
    }


def describe_part(examples: Examples, class_names: list[str]) -> dict[str, Any]:
    counts = np.bincount(examples.labels, minlength=len(class_names)).tolist()
    return {
        "examples": len(examples),
        "per_class": dict(zip(class_names, counts)),
        "repeated_images": sum("-" in id for id in examples.ids.tolist()),
        "pixel_mean": round(float(examples.images.mean()) / 255, 6),
        "pixel_std": round(float(examples.images.std()) / 255, 6),
    }
