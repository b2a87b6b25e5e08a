"""The data of the task. ★ A team replaces this module: how raw files become checked images and labels.

Raw data are four IDX files, as MNIST has them. `python -m ml.task.dataset fetch NAME --to data` gets a known set.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml import files
from ml.errors import UserError, exit_on_user_error
from ml.examples import Dataset, example_ids
from ml.files import Examples
from ml.params import load_params

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
RAW_FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

DIGITS = tuple("0123456789")
CLASS_NAMES = {
    "mnist": DIGITS,
    "digits": DIGITS,
    "fashion-mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
}

# MD5 of the unpacked files. For the sets without an entry, `fetch` verifies the published MD5 of the packed ones.
RAW_MD5 = {
    "mnist": {
        TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
        TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
        TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
        TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
    },
    "digits": {
        TRAIN_IMAGES: "b87f929693f1eb6748a26a689705fdb2",
        TRAIN_LABELS: "747f77ab7fd57e4ac1f02810b9262ca8",
        TEST_IMAGES: "9446f66a7788842abdfe6009433c7e8c",
        TEST_LABELS: "7c231dfe3ca36257821d9ce4141930dc",
    },
}
PUBLISHED_COUNTS = {"mnist": (60000, 10000), "fashion-mnist": (60000, 10000), "kmnist": (60000, 10000)}

UBYTE = 0x08  # IDX type code of unsigned bytes
GZIP_MAGIC = b"\x1f\x8b"


def read_dataset(folder: Path, name: str) -> Dataset:
    """Decode and check the raw files of the data set `name` (load.dataset in params.yaml).

    Raises:
        UserError: a file is missing, torn, swapped or not the published one, a label has no class, or a part is
            empty or of a single class. The message names the file, what was expected and what was found.
    """
    arrays = {file: read_idx(folder / file, dimensions=3 if "images" in file else 1) for file in RAW_FILES}
    if name in PUBLISHED_COUNTS:
        for file, count in zip((TRAIN_LABELS, TEST_LABELS), PUBLISHED_COUNTS[name]):
            if len(arrays[file]) != count:
                raise UserError(
                    f"{folder / file}: {name} has {count} labels here, found {len(arrays[file])}.{mend(name)}"
                )
    for file, expected in RAW_MD5.get(name, {}).items():
        check_md5(folder / file, expected, name)

    class_names = CLASS_NAMES.get(name) or tuple(
        str(label) for label in range(int(arrays[TRAIN_LABELS].max(initial=0)) + 1)
    )
    train = checked_examples(
        folder / TRAIN_IMAGES, arrays[TRAIN_IMAGES], folder / TRAIN_LABELS, arrays[TRAIN_LABELS], class_names
    )
    test = checked_examples(
        folder / TEST_IMAGES, arrays[TEST_IMAGES], folder / TEST_LABELS, arrays[TEST_LABELS], class_names
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"{folder}: training images are {size(train.images)} pixels, test images {size(test.images)}. "
            "Both must have one size."
        )
    return Dataset(train, test, tuple(folder / file for file in RAW_FILES))


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file: 2 zero bytes, type, number of dimensions, each size big-endian, values.

    Raises:
        UserError: the file is missing, is not IDX of unsigned bytes with `dimensions` dimensions, or its length is
            not what its header says.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `make data`, or put the four raw IDX files there.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}.") from None
    kind = {1: "labels (1 dimension)", 3: "images (3 dimensions)"}
    header = 4 + 4 * dimensions
    if len(content) < header or content[:2] != b"\0\0" or content[2] != UBYTE:
        gzipped = " It is gzipped: unpack it." if content[:2] == GZIP_MAGIC else ""
        raise UserError(
            f"{path}: expected an IDX file of unsigned bytes (first bytes 00 00 08 {dimensions:02x}), "
            f"found {content[:4].hex(' ') or 'an empty file'}.{gzipped}"
        )
    if content[3] != dimensions:
        raise UserError(
            f"{path}: expected {kind[dimensions]}, found {kind.get(content[3], f'{content[3]} dimensions')}. "
            "Were two files swapped?"
        )
    shape = tuple(int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dimensions))
    expected = header + math.prod(shape)
    if len(content) != expected:
        raise UserError(
            f"{path}: its header says {' × '.join(map(str, shape))}, which is {expected} bytes, found {len(content)}. "
            f"It is {'cut short' if len(content) < expected else 'too long'}; get it again with `make data`."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def check_md5(path: Path, expected: str, name: str) -> None:
    found = files.md5(path)
    if found == expected:
        return
    known = {md5: f"{file} of {other}" for other, table in RAW_MD5.items() for file, md5 in table.items()}
    what = f" (that is {known[found]})" if found in known else ""
    raise UserError(f"{path}: the file of {name} has MD5 {expected}, found {found}{what}.{mend(name)}")


def mend(name: str) -> str:
    return (
        f"\nGet the published files with `python -m ml.task.dataset fetch {name} --to data`, or, if these are your own "
        "data, set load.dataset in params.yaml to custom."
    )


def checked_examples(
    images_file: Path,
    images: NDArray[np.uint8],
    labels_file: Path,
    labels: NDArray[np.uint8],
    class_names: tuple[str, ...],
) -> Examples:
    if len(images) != len(labels):
        raise UserError(
            f"{images_file} has {len(images)} images, but {labels_file} has {len(labels)} labels."
        )
    if not images.size:
        raise UserError(
            f"{images_file} is empty: found {' × '.join(map(str, images.shape))} pixels, expected at least one image."
        )
    if labels.max() >= len(class_names):
        row = int(np.argmax(labels >= len(class_names)))
        raise UserError(
            f"{labels_file}: label {labels[row]} at row {row} has no class; there are {len(class_names)}, "
            f"0 to {len(class_names) - 1}."
        )
    if labels.min() == labels.max():
        raise UserError(
            f"{labels_file}: all {len(labels)} labels are {labels[0]}. A classifier needs two classes or more."
        )
    return Examples(images, labels.astype(np.int64), example_ids(images), np.array(class_names))


def size(images: NDArray[np.uint8]) -> str:
    return f"{images.shape[1]}×{images.shape[2]}"


def main() -> None:
    from ml import raw_data
    from ml.task import fetch

    parser = argparse.ArgumentParser(prog="python -m ml.task.dataset", description="Get the raw data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    known = commands.add_parser(
        "fetch", help="download, verify and unpack a known set; digits needs no network"
    )
    known.add_argument("name", choices=sorted(CLASS_NAMES))
    known.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the four IDX files")
    tracked = commands.add_parser("restore", help="make data/ what data.dvc says: from DVC, else by fetch")
    for command in (known, tracked):
        command.add_argument(
            "--mirror", metavar="URL|DIR", help="take the files, packed or not, from here alone"
        )
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        fetch.fetch(arguments.name, arguments.to, arguments.mirror)
    else:
        name = load_params().load.dataset
        known_set = partial(fetch.fetch, name, mirror=arguments.mirror) if name in CLASS_NAMES else None
        raw_data.restore(name, known_set)


if __name__ == "__main__":
    exit_on_user_error(main)
