"""Raw IDX files: what is read, what is refused and how it is named, ids, and the description of the data."""

import gzip
import math
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ml import files
from ml.errors import UserError
from ml.examples import describe, example_ids
from ml.task import dataset
from ml.task.dataset import read_dataset, read_idx

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = dataset.RAW_FILES
ToIdx = Callable[[NDArray[np.uint8]], bytes]
WriteRaw = Callable[..., Path]


@pytest.fixture(scope="module")
def idx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx") / "file-idx"


def refusal(folder: Path, name: str = "custom") -> str:
    with pytest.raises(UserError) as caught:
        read_dataset(folder, name)
    return str(caught.value)


def swap(folder: Path, one: str, other: str) -> None:
    contents = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / other).write_bytes(contents[0])
    (folder / one).write_bytes(contents[1])


def link_mnist(mnist: Path, folder: Path) -> Path:
    for file in dataset.RAW_FILES:
        (folder / file).symlink_to(mnist / file)
    return folder


# The IDX format

shapes = st.lists(st.integers(0, 6), min_size=3, max_size=3) | st.lists(
    st.integers(0, 40), min_size=1, max_size=1
)


@given(shapes)
@example([0])
def test_valid_idx_is_read_as_written(idx_file: Path, to_idx: ToIdx, shape: list[int]) -> None:
    array = np.random.RandomState(sum(shape)).randint(0, 256, shape).astype(np.uint8)
    idx_file.write_bytes(to_idx(array))
    found = read_idx(idx_file, len(shape))
    assert found.dtype == np.uint8 and found.shape == array.shape and np.array_equal(found, array)


@given(shapes, st.data())
def test_idx_of_another_length_is_refused(
    idx_file: Path, to_idx: ToIdx, shape: list[int], data: st.DataObject
) -> None:
    content = to_idx(np.zeros(shape, np.uint8))
    length = data.draw(st.integers(0, len(content) + 50).filter(lambda length: length != len(content)))
    idx_file.write_bytes((content + bytes(50))[:length])
    with pytest.raises(UserError, match="file-idx"):
        read_idx(idx_file, len(shape))


@given(shapes, st.data())
def test_idx_with_a_changed_header_is_refused_unless_it_still_fits(
    idx_file: Path, to_idx: ToIdx, shape: list[int], data: st.DataObject
) -> None:
    array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    content = bytearray(to_idx(array))
    where = data.draw(st.integers(0, 3 + 4 * len(shape)))
    content[where] ^= data.draw(st.integers(1, 255))
    idx_file.write_bytes(content)
    claimed = struct.unpack(f">{len(shape)}I", content[4 : 4 + 4 * len(shape)])
    if where >= 4 and math.prod(claimed) == array.size:  # such as 0 × 5 for 0 × 4
        assert read_idx(idx_file, len(shape)).shape == claimed
    else:
        with pytest.raises(UserError, match="file-idx"):
            read_idx(idx_file, len(shape))


@given(st.binary(max_size=200), st.sampled_from([1, 3]))
@example(b"\0\0\x08\x03" + 12 * b"\xff", 3)
@example(b"\0\0\x08\x01\xff\xff\xff\xff", 1)
def test_any_bytes_are_refused_or_have_the_length_of_their_header(
    idx_file: Path, content: bytes, dimensions: int
) -> None:
    idx_file.write_bytes(content)
    try:
        found = read_idx(idx_file, dimensions)
    except UserError:
        return
    assert found.ndim == dimensions and len(content) == 4 + 4 * dimensions + found.size


@pytest.mark.parametrize("kind", [0x09, 0x0B, 0x0C, 0x0D, 0x0E])
def test_idx_of_another_type_is_refused(idx_file: Path, to_idx: ToIdx, kind: int) -> None:
    content = bytearray(to_idx(np.zeros(4, np.uint8)))
    content[2] = kind
    idx_file.write_bytes(content)
    with pytest.raises(UserError, match="expected an IDX file of unsigned bytes"):
        read_idx(idx_file, 1)


# The four files


def test_valid_folder_gives_examples(tmp_path: Path, write_raw: WriteRaw) -> None:
    found = read_dataset(write_raw(tmp_path), "custom")
    assert found.train.images.shape == (30, 5, 4) and found.test.images.shape == (12, 5, 4)
    assert found.train.labels.tolist() == [0, 1, 2] * 10 and found.train.labels.dtype == np.int64
    assert found.train.class_names.tolist() == found.test.class_names.tolist() == ["0", "1", "2"]
    assert len(set(found.train.ids.tolist())) == 30


@pytest.mark.parametrize("file", dataset.RAW_FILES)
def test_missing_file_is_named_with_the_remedy(tmp_path: Path, write_raw: WriteRaw, file: str) -> None:
    (write_raw(tmp_path) / file).unlink()
    message = refusal(tmp_path)
    assert f"{tmp_path / file} is missing" in message and "make data" in message


@pytest.mark.parametrize("file", dataset.RAW_FILES)
def test_truncated_file_is_named_with_both_lengths(tmp_path: Path, write_raw: WriteRaw, file: str) -> None:
    content = (write_raw(tmp_path) / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-1])
    message = refusal(tmp_path)
    assert f"{tmp_path / file}: " in message and "cut short" in message and "make data" in message
    assert str(len(content)) in message and str(len(content) - 1) in message


@pytest.mark.parametrize("file", dataset.RAW_FILES)
def test_file_that_is_too_long_is_named(tmp_path: Path, write_raw: WriteRaw, file: str) -> None:
    with open(write_raw(tmp_path) / file, "ab") as target:
        target.write(b"\n")
    assert f"{tmp_path / file}: " in refusal(tmp_path) and "too long" in refusal(tmp_path)


@pytest.mark.parametrize("file", dataset.RAW_FILES)
def test_empty_file_gzipped_file_and_folder_are_named(tmp_path: Path, write_raw: WriteRaw, file: str) -> None:
    content = (write_raw(tmp_path) / file).read_bytes()
    (tmp_path / file).write_bytes(b"")
    assert f"{tmp_path / file}: " in refusal(tmp_path) and "an empty file" in refusal(tmp_path)
    (tmp_path / file).write_bytes(gzip.compress(content))
    assert f"{tmp_path / file}: " in refusal(tmp_path) and "gzipped: unpack it" in refusal(tmp_path)
    (tmp_path / file).unlink()
    (tmp_path / file).mkdir()
    assert f"{tmp_path / file}" in refusal(tmp_path)


@pytest.mark.parametrize("images, labels", [(TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)])
def test_swapped_images_and_labels_are_named(
    tmp_path: Path, write_raw: WriteRaw, images: str, labels: str
) -> None:
    swap(write_raw(tmp_path, train=70, test=70), images, labels)
    message = refusal(tmp_path)
    assert f"{tmp_path / images}: expected images (3 dimensions), found labels" in message
    assert "swapped" in message


def test_labels_of_the_other_part_are_named_by_their_count(tmp_path: Path, write_raw: WriteRaw) -> None:
    swap(write_raw(tmp_path), TRAIN_LABELS, TEST_LABELS)
    message = refusal(tmp_path)
    assert f"{TRAIN_IMAGES} has 30 images" in message and f"{TRAIN_LABELS} has 12 labels" in message


@pytest.mark.parametrize("part, file", [("train", TRAIN_IMAGES), ("test", TEST_IMAGES)])
@pytest.mark.parametrize("shape", [(0, 5, 4), (6, 0, 4)])
def test_images_without_pixels_are_refused(
    tmp_path: Path, write_raw: WriteRaw, part: str, file: str, shape: tuple[int, ...]
) -> None:
    replaced = {f"{part}_images": np.zeros(shape), f"{part}_labels": np.arange(shape[0]) % 3}
    assert f"{tmp_path / file} is empty" in refusal(write_raw(tmp_path, **replaced))


@pytest.mark.parametrize("part, file", [("train", TRAIN_LABELS), ("test", TEST_LABELS)])
def test_labels_of_a_single_class_are_refused(
    tmp_path: Path, write_raw: WriteRaw, part: str, file: str
) -> None:
    count = {"train": 30, "test": 12}[part]
    message = refusal(write_raw(tmp_path, **{f"{part}_labels": np.full(count, 2)}))
    assert f"{tmp_path / file}: all {count} labels are 2" in message


def test_label_without_a_class_is_named_with_its_row(tmp_path: Path, write_raw: WriteRaw) -> None:
    write_raw(tmp_path, test_labels=np.array([0, 1, 2, 0, 1, 2, 0, 3, 2, 0, 1, 200]))
    assert f"{tmp_path / TEST_LABELS}: label 3 at row 7 has no class; there are 3, 0 to 2" in refusal(
        tmp_path
    )


def test_parts_of_different_image_sizes_are_refused(tmp_path: Path, write_raw: WriteRaw) -> None:
    message = refusal(write_raw(tmp_path, test_images=np.zeros((12, 4, 5))))
    assert "5×4" in message and "4×5" in message


def test_labels_leave_room_for_a_class_that_never_occurs(tmp_path: Path, write_raw: WriteRaw) -> None:
    labels = np.array([0, 1, 3] * 10)
    found = read_dataset(write_raw(tmp_path, train_labels=labels), "custom")
    assert found.train.class_names.tolist() == ["0", "1", "2", "3"]
    assert describe(found, "custom")["train"]["per_class"] == {"0": 10, "1": 10, "2": 0, "3": 10}


# Known sets


@pytest.mark.parametrize("name", dataset.PUBLISHED_COUNTS)
def test_own_data_are_refused_under_the_name_of_a_published_set(
    tmp_path: Path, write_raw: WriteRaw, name: str
) -> None:
    message = refusal(write_raw(tmp_path), name)
    assert f"{tmp_path / TRAIN_LABELS}: {name} has 60000 labels here, found 30" in message
    assert f"fetch {name} --to data" in message and "set load.dataset in params.yaml to custom" in message


def test_own_data_are_refused_as_digits(tmp_path: Path, write_raw: WriteRaw) -> None:
    assert "the file of digits has MD5" in refusal(write_raw(tmp_path), "digits")


def test_real_mnist_has_the_published_counts(mnist: Path) -> None:
    found = read_dataset(mnist, "mnist")
    assert found.train.images.shape == (60000, 28, 28) and found.test.images.shape == (10000, 28, 28)
    assert np.bincount(found.train.labels).tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert np.bincount(found.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert found.train.class_names.tolist() == list("0123456789")
    assert len(set(found.train.ids.tolist())) == 60000


def test_mnist_with_train_and_test_swapped_is_refused_by_its_counts(tmp_path: Path, mnist: Path) -> None:
    for one, other in ((TRAIN_IMAGES, TEST_IMAGES), (TRAIN_LABELS, TEST_LABELS)):
        (tmp_path / one).symlink_to(mnist / other)
        (tmp_path / other).symlink_to(mnist / one)
    assert f"{tmp_path / TRAIN_LABELS}: mnist has 60000 labels here, found 10000" in refusal(
        tmp_path, "mnist"
    )


@pytest.mark.parametrize("file", [TRAIN_LABELS, TEST_LABELS, TEST_IMAGES])
def test_mnist_with_one_file_of_another_set_is_refused_by_its_checksum(
    tmp_path: Path, mnist: Path, file: str
) -> None:
    link_mnist(mnist, tmp_path)
    content = bytearray((mnist / file).read_bytes())
    content[-1] = (content[-1] + 1) % 10
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(content)
    message = refusal(tmp_path, "mnist")
    assert f"{tmp_path / file}: the file of mnist has MD5 {dataset.RAW_MD5['mnist'][file]}, found " in message


def test_mnist_is_refused_as_digits_and_recognised(tmp_path: Path, mnist: Path) -> None:
    assert f"(that is {TRAIN_IMAGES} of mnist)" in refusal(link_mnist(mnist, tmp_path), "digits")


# Ids


def test_ids_are_stable_across_releases_of_this_code() -> None:
    images = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    assert example_ids(images).tolist() == ["e9c38d6fd46b9acb", "1e79d8dd7d8e38be"]


def test_repeats_get_their_own_ids(tmp_path: Path) -> None:
    images = np.zeros((12, 2, 2), np.uint8)
    images[5:] = 7
    ids = example_ids(images).tolist()
    assert len(set(ids)) == 12
    assert [id.partition("-")[2] for id in ids] == ["", "1", "2", "3", "4"] + [
        "",
        "1",
        "2",
        "3",
        "4",
        "5",
        "6",
    ]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_ids_depend_on_the_image_and_not_on_its_place(values: list[int]) -> None:
    images = np.array(values, np.uint8)[:, None, None] * np.ones((1, 3, 2), np.uint8)
    order = np.random.RandomState(len(values)).permutation(len(values))
    ids, reordered = example_ids(images), example_ids(images[order])
    assert set(ids.tolist()) == set(reordered.tolist()) and len(set(ids.tolist())) == len(values)
    for row, place in enumerate(order):
        assert reordered[row].partition("-")[0] == ids[place].partition("-")[0]


def test_ids_tell_apart_the_same_pixels_in_another_shape() -> None:
    pixels = np.arange(6, dtype=np.uint8)
    assert example_ids(pixels.reshape(1, 2, 3)) != example_ids(pixels.reshape(1, 3, 2))


def test_ids_do_not_depend_on_the_memory_layout() -> None:
    images = np.random.RandomState(0).randint(0, 256, (4, 3, 5)).astype(np.uint8)
    assert example_ids(np.asfortranarray(images)).tolist() == example_ids(images).tolist()


# The description


def test_description_counts_classes_repeats_and_leaks(tmp_path: Path, write_raw: WriteRaw) -> None:
    train = np.arange(30 * 20).reshape(30, 5, 4) % 251
    train[4] = train[3]
    test = 255 - np.arange(12 * 20).reshape(12, 5, 4)
    test[0] = train[7]
    test[1] = train[3]
    write_raw(tmp_path, train_images=train, test_images=test)
    found = describe(read_dataset(tmp_path, "custom"), "custom")
    assert (found["image_height"], found["image_width"], found["class_names"]) == (5, 4, ["0", "1", "2"])
    assert found["train"]["examples"] == 30 and found["test"]["examples"] == 12
    assert found["train"]["per_class"] == {"0": 10, "1": 10, "2": 10}
    assert found["train"]["repeated_images"] == 1 and found["test"]["repeated_images"] == 0
    assert found["images_in_both_parts"] == 2
    assert found["train"]["pixel_mean"] == pytest.approx(train.mean() / 255, abs=1e-6)
    assert found["train"]["pixel_std"] == pytest.approx(train.std() / 255, abs=1e-6)
    assert found["md5"] == {file: files.md5(tmp_path / file) for file in dataset.RAW_FILES}
