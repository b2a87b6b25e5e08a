"""The preprocess stage: shares of every class, what the seed decides, and statistics of the training part alone."""

import math
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml import files
from ml.errors import UserError
from ml.files import Examples
from ml.params import PreprocessParams, load_params
from ml.stages import preprocess
from ml.stages.preprocess import drift_reference, pixel_statistics, split_examples


def examples_of(labels: np.ndarray, images: np.ndarray | None = None) -> Examples:
    labels = np.asarray(labels, np.int64)
    if images is None:
        images = np.random.RandomState(1).randint(0, 256, (len(labels), 3, 2)).astype(np.uint8)
    names = np.array([str(label) for label in range(int(labels.max()) + 1)])
    return Examples(images, labels, np.array([f"id{row}" for row in range(len(labels))]), names)


def split_params(fraction: float = 0.2, seed: int = 42) -> PreprocessParams:
    return PreprocessParams(validation_fraction=fraction, split_seed=seed)


class_counts = st.lists(st.integers(20, 60), min_size=2, max_size=6)


@given(class_counts, st.floats(0.05, 0.95), st.integers(0, 2**40))
def test_every_class_has_its_share_and_every_example_is_in_one_part(
    counts: list[int], fraction: float, seed: int
) -> None:
    labels = np.random.RandomState(0).permutation(np.repeat(np.arange(len(counts)), counts))
    split = split_examples(examples_of(labels), split_params(fraction, seed))
    assert sorted([*split.train, *split.validation]) == list(range(len(labels)))
    assert np.all(np.diff(split.train) > 0) and np.all(np.diff(split.validation) > 0)
    held_out = np.bincount(labels[split.validation], minlength=len(counts))
    assert np.all(np.abs(held_out - np.array(counts) * fraction) <= 0.5 + 1e-9)


def test_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    examples = examples_of(np.arange(300) % 3)
    first, second = (split_examples(examples, split_params(seed=7)) for _ in range(2))
    other = split_examples(examples, split_params(seed=8))
    assert np.array_equal(first.validation, second.validation) and np.array_equal(first.train, second.train)
    assert not np.array_equal(first.validation, other.validation)


def test_split_of_a_seed_is_the_same_in_every_release() -> None:
    split = split_examples(examples_of(np.arange(20) % 2), split_params(0.3, seed=42))
    assert split.validation.tolist() == [1, 2, 3, 10, 16, 17]


def test_rows_are_drawn_and_not_taken_in_order() -> None:
    validation = split_examples(examples_of(np.arange(300) % 3), split_params(0.5)).validation
    assert not np.array_equal(validation, np.arange(150)) and not np.array_equal(
        validation, np.arange(150, 300)
    )


def test_statistics_are_those_of_the_training_part_alone() -> None:
    examples = examples_of(np.arange(60) % 3)
    split = split_examples(examples, split_params())
    pixels = examples.images[split.train] / 255
    assert split.mean == pytest.approx(pixels.mean(), abs=1e-12)
    assert split.std == pytest.approx(pixels.std(), abs=1e-12)
    changed = examples.images.copy()
    changed[split.validation] = 0
    again = split_examples(examples_of(examples.labels, changed), split_params())
    assert (again.mean, again.std) == (split.mean, split.std)


@pytest.mark.parametrize("count, fraction", [(1, 0.5), (2, 0.2), (4, 0.1), (3, 0.9)])
def test_class_too_small_for_both_parts_is_named(count: int, fraction: float) -> None:
    labels = np.concatenate([np.zeros(100), np.ones(count)])
    with pytest.raises(
        UserError, match=f"class 1 has {count} training examples: preprocess.validation_fraction"
    ):
        split_examples(examples_of(labels), split_params(fraction))


@pytest.mark.parametrize("value", [0, 1, 11, 128, 255])
@pytest.mark.parametrize("count", [40, 44, 60])
def test_images_of_a_single_value_are_a_user_error(value: int, count: int) -> None:
    images = np.full((count, 3, 1), value, np.uint8)
    with pytest.raises(UserError, match=f"every training pixel is {value}: there is nothing to learn"):
        split_examples(examples_of(np.arange(count) % 2, images), split_params())


@pytest.mark.parametrize("count", [1, 3, 7, 7840])
def test_every_single_value_is_found_whatever_its_rounding(count: int) -> None:
    for value in range(256):
        with pytest.raises(UserError, match=f"is {value}: "):
            pixel_statistics(np.full((count, 1, 1), value, np.uint8))


def test_one_pixel_that_differs_is_enough() -> None:
    images = np.zeros((100, 28, 28), np.uint8)
    images[3, 4, 5] = 1
    mean, std = pixel_statistics(images)
    assert mean == pytest.approx(1 / 255 / images.size) and std == pytest.approx((images / 255).std())


@pytest.mark.parametrize("seed", range(20))
def test_statistics_are_the_exact_ones_to_the_last_bit(seed: int) -> None:
    """Whatever order a processor's kernels add in: else the split's hash, and with it the model, would be another."""
    images = np.random.RandomState(seed).randint(0, 256, (50, 7, 9)).astype(np.uint8)
    pixels = [Fraction(int(pixel), 255) for pixel in images.ravel()]
    exact = sum(pixels) / len(pixels)
    variance = sum((pixel - exact) ** 2 for pixel in pixels) / len(pixels)
    assert pixel_statistics(images) == (float(exact), math.sqrt(variance))


def test_drift_reference_is_brightness_contrast_ink_and_class_shares() -> None:
    images = np.array([[[0, 0]], [[255, 255]], [[0, 255]], [[127, 128]]], np.uint8)
    reference = drift_reference(images, np.array([0, 2, 2, 1]))
    assert reference["brightness"].tolist() == [0, 1, 0.5, 0.5]
    assert reference["contrast"].tolist() == pytest.approx([0, 0, 0.5, 0.5 / 255])
    assert reference["ink"].tolist() == [0, 1, 0.5, 0.5]
    assert reference["class_shares"].tolist() == [0.25, 0.25, 0.5]


def test_stage_saves_the_split_and_the_reference_of_its_training_part(workplace: Path) -> None:
    examples = examples_of(np.arange(60) % 3)
    files.save_examples(files.TRAIN_EXAMPLES, examples)
    preprocess.main()
    split = files.load_split()
    expected_split = split_examples(examples, load_params().preprocess)
    assert np.array_equal(split.train, expected_split.train)
    assert np.array_equal(split.validation, expected_split.validation)
    names = ("brightness", "contrast", "ink", "class_shares")
    saved = files.load_arrays(files.DRIFT_REFERENCE, "preprocess", names)
    expected = drift_reference(examples.images[split.train], examples.labels[split.train])
    assert all(np.array_equal(saved[name], expected[name]) for name in names)


def test_stage_without_its_input_exits_1_and_names_the_stage_before(
    workplace: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    answer = run_python("-m", "ml.stages.preprocess")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "artifacts/train.npz is missing. Run `dvc repro load`" in answer.stderr
    assert not files.SPLIT.exists() and not files.DRIFT_REFERENCE.exists()
