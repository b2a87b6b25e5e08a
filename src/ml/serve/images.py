"""Uploaded bytes to the pixels that the model takes. Whatever was changed on the way is told in the answer.

PNG, JPEG, BMP, WebP, IDX (one or many images) and .npy (uint8). An image of the model's own size in 8-bit grey on the
usual background comes through bit for bit; anything else is made so: EXIF rotation, transparency laid over a contrasting
ground, 16 bits to 8, colours to grey, a light background inverted, resized with antialiasing, padded to keep its shape.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml.serve.problems import Problem

Pixels = NDArray[np.uint8]
Invert = Literal["auto", "never", "always"]
PNG = b"\x89PNG\r\n\x1a\n"
FORMATS = "PNG, JPEG, BMP, WebP, IDX (uint8) or .npy (uint8)"
LIGHT = 128  # a pixel this bright or brighter is light
SMALLEST = (
    8  # pixels of a side: an "image" with a shorter one is a row of measurements, which nobody can resize
)
SMALL = 2**16  # pixels of an image that may be decoded between two other requests: 1 ms


@dataclass(frozen=True)
class Target:
    """What the model takes: height and width in pixels, and whether its images have a dark background."""

    height: int
    width: int
    dark_background: bool
    max_pixels: int
    max_images: int

    @property
    def is_picture(self) -> bool:
        return min(self.height, self.width) >= SMALLEST


@dataclass(frozen=True)
class Picture:
    """pixels (height, width) uint8 as the model takes them; what came; what was done to it, in order."""

    pixels: Pixels
    format: str
    width: int
    height: int
    mode: str  # Pillow's name of the colour mode
    done: tuple[str, ...] = ()


def unreadable(kind: str, detail: str) -> Problem:
    return Problem(422, "unreadable-image", f"This is no readable {kind} image: {detail}.")


def too_many_pixels(width: int, height: int, limit: int) -> Problem:
    return Problem(
        413,
        "too-many-pixels",
        f"The image has {width}×{height} pixels; at most {limit:,} are taken. Send it smaller.",
    )


def sniff(data: bytes) -> str | None:
    """The format by its first bytes: names and content types lie."""
    if data.startswith(PNG):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"BM"):
        return "BMP"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"\x93NUMPY"):
        return "NPY"
    if len(data) > 4 and data[:2] == b"\0\0" and data[2] in (8, 9, 11, 12, 13, 14) and data[3] <= 4:
        return "IDX"
    return None


def plain_png(data: bytes, target: Target) -> Pixels | None:
    """The common case in 5 µs: 8-bit grey PNG of the model's size on the usual background. None: any other."""
    if data[:8] != PNG or data[8:16] != b"\0\0\0\rIHDR" or len(data) > SMALL:
        return None
    if data[16:29] != struct.pack(">IIBBBBB", target.width, target.height, 8, 0, 0, 0, 0):
        return None
    position, crc32 = 8, zlib.crc32
    try:
        while True:  # pyspng does not check the sums
            length = int.from_bytes(data[position : position + 4], "big")
            end = position + 8 + length
            kind = data[position + 4 : position + 8]
            if kind not in (b"IHDR", b"IDAT", b"IEND"):
                return None
            if crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big") or end + 4 > len(
                data
            ):
                return None
            if kind == b"IEND":
                break
            position = end + 4
        pixels: Pixels = load_png(data)
    except RuntimeError:  # pyspng's
        return None
    if pixels.dtype != np.uint8 or pixels.shape != (target.height, target.width):
        return None
    if target.dark_background and pixels.item(0) >= LIGHT and is_light(pixels):
        return None
    return pixels


def load_png(data: bytes) -> Any:
    global load_png  # looked up once: an import statement costs more than the decoding
    from pyspng import load as load_png

    return load_png(data)


def decode(data: bytes, target: Target, invert: Invert = "auto") -> list[Picture]:
    """The pictures in one file.

    Raises:
        Problem: 415 unknown format, 422 unreadable or not an image that makes sense, 413 too large.
    """
    kind = sniff(data)
    if kind is None:
        found = "nothing" if not data else f"bytes that begin with {data[:8].hex(' ')}"
        raise Problem(415, "unknown-format", f"Found {found}. Send {FORMATS}.")
    if kind == "IDX":
        return [finish(pixels, kind, "L", target, invert) for pixels in read_idx(data, target)]
    if kind == "NPY":
        return [finish(pixels, kind, "L", target, invert) for pixels in read_npy(data, target)]
    pixels = plain_png(data, target) if invert != "always" else None
    if pixels is not None:
        return [Picture(pixels, "PNG", target.width, target.height, "L")]
    return [read_picture(data, kind, target, invert)]


def read_idx(data: bytes, target: Target) -> Pixels:
    """(N, H, W) uint8 of an IDX file with one image (2 dimensions) or many (3)."""
    element, dimensions = data[2], data[3]
    if element != 8:
        raise unreadable("IDX", f"its element type is 0x{element:02x}, only 0x08 (unsigned byte) is taken")
    if dimensions not in (2, 3) or len(data) < 4 + 4 * dimensions:
        raise unreadable("IDX", f"it has {dimensions} dimensions; 2 (one image) or 3 (many) are taken")
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    return stack(data, 4 + 4 * dimensions, shape, "IDX", target)


def read_npy(data: bytes, target: Target) -> Pixels:
    """(N, H, W) uint8 of a .npy file with one image (2 dimensions) or many (3). Pickles are not read."""
    from numpy.lib import format as npy

    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read_header(file, max_header_size=1000)
    except Exception as error:  # the header is Python source: numpy's parser raises what Python's does
        raise unreadable("NPY", f"its header cannot be read ({type(error).__name__})") from None
    if dtype != np.uint8 or len(shape) not in (2, 3) or fortran:
        raise unreadable(
            "NPY", f"it has {len(shape)} dimensions of {dtype}; 2 or 3 of uint8 in C order are taken"
        )
    return stack(data, file.tell(), shape, "NPY", target)


def stack(data: bytes, start: int, shape: tuple[int, ...], kind: str, target: Target) -> Pixels:
    if (
        len(shape) == 2
    ):  # one image, or a table with an example in each row, where that is what the model takes
        shape = (shape[0], 1, shape[1]) if target.height == 1 and shape[1] == target.width else (1, *shape)
    count, height, width = shape
    if count > target.max_images:
        raise too_many_images(count, target.max_images)
    if height * width > target.max_pixels:
        raise too_many_pixels(width, height, target.max_pixels)
    if min(count, height, width) < 1 or len(data) - start != count * height * width:
        raise unreadable(
            kind,
            f"its header says {tuple(shape)}, that is {count * height * width:,} bytes, and {len(data) - start:,} follow",
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(count, height, width)


def too_many_images(count: int, limit: int) -> Problem:
    return Problem(413, "too-many-images", f"{count:,} images in one request; at most {limit:,} are taken.")


def opener(kind: str) -> Callable[[io.BytesIO], Any]:
    """The format's own reader: Image.open would try all of Pillow's."""
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    readers: dict[str, Callable[[io.BytesIO], Any]] = {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.jpeg_factory,
        "BMP": BmpImagePlugin.BmpImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
    }
    return readers[kind]


def read_picture(data: bytes, kind: str, target: Target, invert: Invert) -> Picture:
    from PIL import ImageOps

    try:
        image = opener(kind)(io.BytesIO(data))
        width, height = image.size
        if width * height > target.max_pixels:
            raise too_many_pixels(width, height, target.max_pixels)
        if max(width, height) > 100 * min(width, height):
            raise Problem(422, "odd-shape", f"{width}×{height} pixels is a line, not a picture.")
        mode, done = image.mode, []
        if kind == "JPEG":  # decodes at an eighth where that is enough: less memory
            image.draft(None, (target.width * 4, target.height * 4))
        image.load()
        if image.getexif().get(0x0112, 1) not in (0, 1):
            turned = ImageOps.exif_transpose(image)
            if turned is not None:
                image, done = turned, ["turned as its EXIF orientation says"]
        grey, more = to_grey(image)
    except Problem:
        raise
    except MemoryError:
        raise too_many_pixels(width, height, target.max_pixels) from None
    except (
        Exception
    ) as error:  # whatever a decoder meets in hostile bytes: OSError, SyntaxError, struct.error, ValueError, …
        raise unreadable(
            kind, type(error).__name__ + (f" ({str(error)[:80]})" if isinstance(error, OSError) else "")
        ) from None
    found = finish(np.asarray(grey), kind, mode, target, invert, (*done, *more))
    return Picture(found.pixels, kind, width, height, mode, found.done)


def to_grey(image: Any) -> tuple[Any, list[str]]:
    """An 8-bit grey image, and what was done for it."""
    from PIL import Image

    done = []
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits
        deep = np.asarray(image).astype(np.float64)
        top = 65535.0 if deep.max() > 255 or image.mode != "F" else 255.0
        return Image.fromarray((deep.clip(0, top) / top * 255 + 0.5).astype(np.uint8)), ["16 bits to 8"]
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        grey, alpha = np.asarray(image.convert("L")), np.asarray(image.getchannel("A"))
        if (alpha < 255).any():
            weight = alpha.astype(np.float32) / 255
            seen = float((grey * weight).sum() / max(float(weight.sum()), 1.0))
            ground = 0 if seen >= LIGHT else 255  # so that a white stroke and a black one both stay visible
            mixed = grey * weight + ground * (1 - weight)
            done.append("laid over " + ("white" if ground else "black"))
            return Image.fromarray((mixed + 0.5).astype(np.uint8)), done
        return Image.fromarray(grey), ["colours to grey"]
    if image.mode == "L":
        return image, done
    if image.mode == "1":
        return image.convert("L"), ["1 bit to 8"]
    if image.mode == "P":
        image = image.convert("RGB")
    return image.convert("L"), ["colours to grey"]


def finish(
    pixels: Pixels, kind: str, mode: str, target: Target, invert: Invert, done: tuple[str, ...] = ()
) -> Picture:
    """Invert, resize and pad grey `pixels` of any size as the target wants them."""
    height, width = pixels.shape
    if invert == "always" or (invert == "auto" and target.dark_background and is_light(pixels)):
        pixels, done = 255 - pixels, (*done, "inverted")
    if (height, width) != (target.height, target.width):
        if not target.is_picture:
            raise Problem(
                422,
                "wrong-shape",
                f"Found {height}×{width} values (height × width). This model takes {target.height}×{target.width}, each a "
                "number of its own: they cannot be resized.",
            )
        pixels, more = resize(pixels, target)
        done = (*done, *more)
    return Picture(np.ascontiguousarray(pixels), kind, width, height, mode, done)


def border(pixels: Pixels) -> Pixels:
    return np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])


def is_light(pixels: Pixels) -> bool:
    """Whether at least three quarters of the outermost pixels are light."""
    return bool((border(pixels) >= LIGHT).mean() >= 0.75)


def resize(pixels: Pixels, target: Target) -> tuple[Pixels, tuple[str, ...]]:
    """Fit into the target with antialiasing, its shape kept; what is left over gets the border's median."""
    from PIL import Image

    height, width = pixels.shape
    scale = min(target.height / height, target.width / width)
    size = (
        min(target.width, max(1, round(width * scale))),
        min(target.height, max(1, round(height * scale))),
    )
    image = Image.fromarray(pixels)
    fitted = np.asarray(image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0))
    done: tuple[str, ...] = (f"resized from {width}×{height} to {size[0]}×{size[1]}",)
    if size == (target.width, target.height):
        return fitted, done
    whole = np.full((target.height, target.width), np.median(border(pixels)), np.uint8)
    top, left = (target.height - size[1]) // 2, (target.width - size[0]) // 2
    whole[top : top + size[1], left : left + size[0]] = fitted
    return whole, (*done, f"padded to {target.width}×{target.height}")
