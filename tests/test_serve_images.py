"""Uploaded bytes to pixels: every format, size and colour mode; nothing hostile gets through, nor takes long."""

import struct
import time
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from ml.serve import images
from ml.serve.images import Target, decode, plain_png
from ml.serve.problems import Problem
from tests.serving import make_images, png

TARGET = Target(28, 28, True, 1_000_000, 100)
DIGIT = make_images(8)[7]


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def idx(array: "np.ndarray[Any, Any]") -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def npy(array: "np.ndarray[Any, Any]") -> bytes:
    file = BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


@pytest.mark.parametrize(
    "data, kind",
    [
        (png(DIGIT), "PNG"),
        (png(DIGIT, "BMP"), "BMP"),
        (idx(DIGIT), "IDX"),
        (npy(DIGIT), "NPY"),
        (png(DIGIT, "WEBP", lossless=True), "WEBP"),
    ],
)
def test_image_of_the_models_size_comes_through_bit_for_bit(data: bytes, kind: str) -> None:
    (picture,) = decode(data, TARGET)
    assert (picture.format, picture.width, picture.height) == (kind, 28, 28)
    assert (picture.pixels == DIGIT).all() and "inverted" not in picture.done


def test_jpeg_is_close_to_what_was_compressed() -> None:
    (picture,) = decode(png(DIGIT, "JPEG", quality=95), TARGET)
    assert np.abs(picture.pixels.astype(int) - DIGIT).mean() < 6 and picture.format == "JPEG"


def test_usual_png_takes_the_fast_way_and_both_ways_agree() -> None:
    for image in make_images(20):
        data = png(image)
        fast = plain_png(data, TARGET)
        assert fast is not None and (fast == images.read_picture(data, "PNG", TARGET, "auto").pixels).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16", "I", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_the_same_digit(mode: str) -> None:
    grey = Image.fromarray(np.where(DIGIT > 100, 255, 0).astype(np.uint8))
    if mode.startswith("I"):
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        data = file_of(image, "PNG")
    elif mode in ("CMYK", "YCbCr"):
        data = file_of(grey.convert(mode), "JPEG", quality=100)
    else:
        data = file_of(grey.convert("RGBA").convert(mode) if mode == "LA" else grey.convert(mode), "PNG")
    (picture,) = decode(data, TARGET)
    assert np.abs(picture.pixels.astype(int) - np.asarray(grey)).mean() < 6, picture.done
    assert picture.done and "inverted" not in picture.done


@pytest.mark.parametrize("stroke, ground", [(0, "white"), (255, "black")])
def test_transparent_image_is_laid_over_what_shows_its_stroke(stroke: int, ground: str) -> None:
    layers = np.zeros((28, 28, 4), np.uint8)
    layers[..., :3] = stroke
    layers[..., 3] = np.where(DIGIT > 100, 255, 0)
    (picture,) = decode(png(layers), TARGET)
    assert f"laid over {ground}" in picture.done
    assert (picture.pixels == np.where(DIGIT > 100, 255, 0)).all()  # light on dark, whichever it was


def test_light_background_is_inverted_only_where_the_models_own_is_dark() -> None:
    data = png(255 - DIGIT)
    (picture,) = decode(data, TARGET)
    assert picture.done == ("inverted",) and (picture.pixels == DIGIT).all()
    (picture,) = decode(data, Target(28, 28, False, 1_000_000, 100))
    assert picture.done == () and (picture.pixels == 255 - DIGIT).all()
    (picture,) = decode(data, TARGET, "never")
    assert picture.done == () and (picture.pixels == 255 - DIGIT).all()
    (picture,) = decode(png(DIGIT), TARGET, "always")
    assert picture.done == ("inverted",) and (picture.pixels == 255 - DIGIT).all()


@pytest.mark.parametrize("factor", [4, 10])
def test_large_image_is_resized_with_antialiasing(factor: int) -> None:
    large = np.kron(DIGIT, np.ones((factor, factor), np.uint8))
    (picture,) = decode(png(large), TARGET)
    assert picture.done == (f"resized from {28 * factor}×{28 * factor} to 28×28",)
    assert np.abs(picture.pixels.astype(int) - DIGIT).mean() < 8
    thin = np.zeros((280, 280), np.uint8)
    thin[:, 100] = 255  # a line of one pixel must not vanish, as it would when every tenth pixel were picked
    (picture,) = decode(png(thin), TARGET)
    assert picture.pixels.max() > 10


def test_oblong_image_keeps_its_shape_and_is_padded_with_its_background() -> None:
    wide = np.full((20, 80), 250, np.uint8)
    wide[5:15, 30:50] = 0
    (picture,) = decode(png(wide), TARGET)
    assert picture.done[0] == "inverted" and "padded to 28×28" in picture.done
    assert picture.pixels[0].max() <= 10 and picture.pixels[14].max() > 200


def test_photo_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(np.rot90(DIGIT).copy()), "JPEG", quality=95, exif=exif)
    (picture,) = decode(data, TARGET)
    assert picture.done[0].startswith("turned")
    assert np.abs(picture.pixels.astype(int) - DIGIT).mean() < 8


def test_arrays_hold_many_images() -> None:
    many = make_images(9)
    for data in (idx(many), npy(many)):
        found = decode(data, TARGET)
        assert len(found) == 9 and all((one.pixels == image).all() for one, image in zip(found, many))


def with_size(width: int, height: int) -> bytes:
    """A small PNG whose header says that it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
        + chunk(b"IEND", b"")
    )


HOSTILE = [
    (b"", 415),
    (b"hello", 415),
    (b"GIF89a" + bytes(100), 415),
    (b"%PDF-1.4", 415),
    (png(DIGIT)[:60], 422),
    (png(DIGIT)[:8], 422),
    (png(DIGIT, "JPEG")[:200], 422),
    (png(DIGIT, "WEBP")[:30], 422),
    (png(DIGIT, "BMP")[:40], 422),
    (b"BM" + bytes(60), 422),
    (b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(50), 422),
    (with_size(9000, 9000), 413),
    (with_size(2**31 - 1, 2**31 - 1), 413),
    (with_size(0, 28), 422),
    (with_size(900_000, 1), 422),
    (idx(DIGIT)[:-1], 422),
    (idx(DIGIT) + b"x", 422),
    (struct.pack(">BBBBIII", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), 413),
    (struct.pack(">BBBBIII", 0, 0, 8, 3, 0, 28, 28), 422),
    (struct.pack(">BBBBI", 0, 0, 8, 1, 5) + b"12345", 422),
    (b"\0\0\x0d\x03" + bytes(12), 422),
    (npy(DIGIT.astype(np.float64)), 422),
    (npy(DIGIT)[:-1], 422),
    (b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 2), }" + bytes(100), 422),
    (b"\x93NUMPY\x03\x00" + bytes(100), 422),
]


@pytest.mark.parametrize("data, status", HOSTILE)
def test_hostile_upload_is_refused_quickly(data: bytes, status: int) -> None:
    images.opener("PNG")  # Pillow is imported at the first picture
    started = time.perf_counter()
    with pytest.raises(Problem) as caught:
        decode(data, TARGET)
    assert caught.value.status == status and time.perf_counter() - started < 0.2


def test_png_with_a_wrong_checksum_is_refused() -> None:
    data = bytearray(png(DIGIT))
    place = data.index(b"IDAT") + 10
    data[place] ^= 1
    with pytest.raises(Problem) as caught:
        decode(bytes(data), TARGET)
    assert caught.value.status == 422


@hypothesis_settings(max_examples=300)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "WEBP", "IDX", "NPY"]),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 40),
)
def test_damaged_file_is_an_image_or_a_problem(kind: str, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray({"IDX": idx(DIGIT), "NPY": npy(DIGIT)}.get(kind) or png(DIGIT, kind))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        found = decode(bytes(data[: len(data) - cut]), TARGET)
    except Problem as problem:
        assert problem.status in (413, 415, 422)
    else:
        assert all(one.pixels.shape == (28, 28) and one.pixels.dtype == np.uint8 for one in found)


@hypothesis_settings(max_examples=200)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"BM", b"\xff\xd8\xff", b"\0\0\x08\x02", b"\x93NUMPY\x01\0"]),
)
def test_any_bytes_are_an_image_or_a_problem(data: bytes, start: bytes) -> None:
    try:
        decode(start + data, TARGET)
    except Problem as problem:
        assert problem.status in (413, 415, 422)


FLAT = Target(1, 4, False, 1_000_000, 100)


def test_measurements_are_never_resized_into_an_answer() -> None:
    (one,) = decode(idx(np.array([[51, 35, 14, 2]], np.uint8)), FLAT)
    assert one.pixels.tolist() == [[51, 35, 14, 2]] and one.done == ()
    for data in (
        idx(np.zeros((5, 3), np.uint8)),
        idx(np.zeros((2, 28, 28), np.uint8)),
        png(np.zeros((28, 28), np.uint8)),
    ):
        with pytest.raises(Problem) as found:
            decode(data, FLAT)
        assert found.value.status == 422 and "takes 1×4" in found.value.detail


def test_table_of_measurements_is_an_example_in_each_row() -> None:
    table = np.arange(20, dtype=np.uint8).reshape(5, 4)
    found = decode(idx(table), FLAT)
    assert [each.pixels.tolist() for each in found] == [[row] for row in table.tolist()]
    with pytest.raises(Problem) as refused:
        decode(idx(np.zeros((101, 4), np.uint8)), FLAT)
    assert refused.value.status == 413
