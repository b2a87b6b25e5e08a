"""preprocess: split off the validation part, measure the training pixels, keep a reference for drift."""

import math

import numpy as np
from numpy.typing import NDArray

from ml import files
from ml.cost import measured
from ml.errors import UserError, exit_on_user_error
from ml.files import Examples, Split
from ml.params import PreprocessParams, load_params

INK = 128  # a pixel this bright or brighter counts as ink


def split_examples(examples: Examples, params: PreprocessParams) -> Split:
    """Put the same share of every class into the validation part, by the seed; statistics from the rest alone.

    Raises:
        UserError: a class has too few examples for one in each part, or all training pixels are equal.
    """
    random = np.random.RandomState(
        params.split_seed % 2**32
    )  # the legacy generator's stream is frozen by numpy
    train, validation = [], []
    for label in np.unique(examples.labels):
        rows = random.permutation(np.flatnonzero(examples.labels == label))
        held_out = round(len(rows) * params.validation_fraction)
        if not 0 < held_out < len(rows):
            raise UserError(
                f"class {label} has {len(rows)} training examples: preprocess.validation_fraction "
                f"{params.validation_fraction} leaves {len(rows) - held_out} to train on and {held_out} to validate on, "
                "and each part needs one. Change it in params.yaml, or add examples."
            )
        validation.append(rows[:held_out])
        train.append(rows[held_out:])
    train_rows, validation_rows = np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))
    mean, std = pixel_statistics(examples.images[train_rows])
    return Split(train_rows, validation_rows, mean, std)


def pixel_statistics(images: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean and standard deviation of the pixels on 0..1, with the same bits on every processor.

    From whole numbers: a floating-point sum depends on the order in which a processor's kernels add.
    """
    counts = np.bincount(images.ravel(), minlength=256).tolist()
    number = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    variance = number * squares - total * total  # of pixels on 0..255, times number²
    if variance == 0:
        raise UserError(
            f"every training pixel is {total // number}: there is nothing to learn. Check the image files."
        )
    return total / (255 * number), math.sqrt(variance / (255 * number) ** 2)


def drift_reference(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """What monitoring compares requests with: per training image mean, contrast and share of ink, and class shares."""
    pixels = images.reshape(len(images), -1)
    return {
        "brightness": pixels.mean(1) / 255,
        "contrast": pixels.std(1) / 255,
        "ink": (pixels >= INK).mean(1),
        "class_shares": np.bincount(labels) / len(labels),
    }


def main() -> None:
    with measured("preprocess"):
        params = load_params().preprocess
        examples = files.load_examples(files.TRAIN_EXAMPLES)
        split = split_examples(examples, params)
        files.save_split(split)
        reference = drift_reference(examples.images[split.train], examples.labels[split.train])
        files.save_arrays(files.DRIFT_REFERENCE, **reference)


if __name__ == "__main__":
    exit_on_user_error(main)
