"""Get the raw files of a known data set: downloaded and verified, or made from scikit-learn's embedded digits."""

import gzip
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import requests
import urllib3
from numpy.typing import NDArray
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from ml import files
from ml.errors import UserError
from ml.progress import progress
from ml.task import dataset
from ml.task.torchvision_import import import_torchvision

TIMEOUT = (10.0, 60.0)  # seconds to connect; between two pieces
PIECE = 1 << 16  # bytes
TEST_SHARE = 5  # every fifth example of the embedded digits, after a shuffle, is a test example


def fetch(name: str, to: Path, mirror: str | None = None) -> None:
    """Put the four raw IDX files of `name` into the folder `to`.

    What has been downloaded stays in `to`.part until all four files are verified, so an interrupted call goes on
    where it stopped and the files in `to` are replaced only then.

    Args:
        mirror: a URL or a folder to take the files from, instead of the addresses that torchvision knows.

    Raises:
        UserError: no mirror answered, or a file is not the published one.
    """
    to = to.resolve()  # so that `.` has a name
    offline = name == "digits" or (mirror is not None and Path(mirror).is_dir())
    # Only downloads are gone on with, and only those of the same set: another's file would pass for its own.
    staging = to.with_name(f"{to.name}.{name}.{'copy' if offline else 'part'}")
    try:
        if offline and staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
        if name == "digits":
            write_digits(staging)
        elif offline:
            copy_files(name, Path(str(mirror)), staging)
        else:
            mirrors, packed_md5 = torchvision_source(name)
            for file in dataset.RAW_FILES:
                download(
                    name, f"{file}.gz", packed_md5[f"{file}.gz"], [mirror] if mirror else mirrors, staging
                )
        try:
            dataset.read_dataset(staging, name)
        except UserError:
            shutil.rmtree(staging)  # the next call starts afresh
            raise

        to.mkdir(parents=True, exist_ok=True)
        for file in dataset.RAW_FILES:
            (staging / file).replace(to / file)
        shutil.rmtree(staging)
    except OSError as error:
        raise UserError(
            f"{to} could not be written: {error}.\n"
            "Make room or mend the permissions, then run the same command again."
        ) from error
    print(f"{name}: four files in {to}, verified.", file=sys.stderr)


def torchvision_source(name: str) -> tuple[list[str], dict[str, str]]:
    """Mirrors and the MD5 of each packed file, as torchvision has them."""
    import_torchvision()
    from torchvision.datasets import KMNIST, MNIST, FashionMNIST

    source = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}[name]
    return source.mirrors, dict(source.resources)


def download(name: str, file: str, md5: str, mirrors: list[str], folder: Path) -> None:
    """Download and unpack one file from the first mirror that has it with the right checksum.

    Raises:
        UserError: none has. It names each mirror with what it answered, and the remedies.
    """
    if (folder / file.removesuffix(".gz")).exists():
        return
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file}"
        begun = (folder / file).exists()
        try:
            resume_download(url, folder / file)
            if begun and files.md5(folder / file) != md5:  # the beginning was of something else
                (folder / file).unlink()
                resume_download(url, folder / file)
        except (requests.RequestException, OSError) as error:
            failures.append(f"  {url}: {reason(error)}")
            continue
        found = files.md5(folder / file)
        if found == md5:
            unpack(folder / file)
            return
        (folder / file).unlink()
        failures.append(f"  {url}: expected MD5 {md5}, found {found}")
    raise UserError(
        f"{file} of {name} could not be downloaded:\n" + "\n".join(failures) + "\n"
        "Either configure a DVC remote that has the data and run `dvc pull data.dvc`,\n"
        f"or get the files elsewhere and run `python -m ml.task.dataset fetch {name} --to data --mirror URL-OR-FOLDER`."
    )


def resume_download(url: str, path: Path) -> None:
    """Append to `path` what it still lacks of `url`. Raises requests' exceptions."""
    retries = Retry(
        total=3, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False
    )
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=retries))
        session.mount("https://", HTTPAdapter(max_retries=retries))
        have = path.stat().st_size if path.exists() else 0
        headers = (
            {"Range": f"bytes={have}-", "Accept-Encoding": "identity"}
            if have
            else {"Accept-Encoding": "identity"}
        )
        with session.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
            if have and answer.status_code == requests.codes.requested_range_not_satisfiable:
                return  # already whole
            answer.raise_for_status()
            resumed = answer.status_code == requests.codes.partial_content
            have = have if resumed else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with (
                open(path, "ab" if resumed else "wb") as file,
                progress(path.name, total, "B", initial=have) as bar,
            ):
                try:  # as sent: a server that calls a .gz an encoding must not have it unpacked here
                    for piece in answer.raw.stream(PIECE, decode_content=False):
                        file.write(piece)
                        bar.update(len(piece))
                except urllib3.exceptions.HTTPError as error:
                    raise requests.ConnectionError(error) from error
    if total is not None and path.stat().st_size < total:
        raise requests.ConnectionError(f"the connection closed after {path.stat().st_size} of {total} bytes")


def reason(error: Exception) -> str:
    """The innermost cause, without the URL that the caller has already named."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def unpack(packed: Path) -> None:
    with gzip.open(packed) as source:
        content = source.read()
    files.write_bytes(packed.with_suffix(""), content)
    packed.unlink()


def copy_files(name: str, source: Path, folder: Path) -> None:
    """Copy the four files, packed or not, from a folder."""
    for file in dataset.RAW_FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, folder / file)
        elif (source / f"{file}.gz").exists():
            shutil.copyfile(source / f"{file}.gz", folder / f"{file}.gz")
            try:
                unpack(folder / f"{file}.gz")
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{source / file}.gz could not be unpacked: {error}.") from None
        else:
            raise UserError(f"{source} has neither {file} nor {file}.gz, which {name} needs.")


def write_digits(folder: Path) -> None:
    """scikit-learn's 1,797 handwritten 8×8 digits as 28×28 IDX files, 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = enlarge(bunch.images.astype(np.int64)), bunch.target.astype(np.uint8)
    order = np.random.RandomState(0).permutation(
        len(labels)
    )  # the legacy generator's stream is frozen by numpy
    test, train = order[::TEST_SHARE], np.delete(order, np.s_[::TEST_SHARE])
    parts = {
        dataset.TRAIN_IMAGES: images[train],
        dataset.TRAIN_LABELS: labels[train],
        dataset.TEST_IMAGES: images[test],
        dataset.TEST_LABELS: labels[test],
    }
    for file, array in parts.items():
        write_idx(folder / file, array)


def enlarge(images: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(N, 8, 8) of 0..16 to (N, 28, 28) of 0..255, bilinear, in whole numbers: the same bits on every machine."""
    small, large = 8, 28
    position = (
        2 * np.arange(large) + 1
    ) * small - large  # of each pixel's centre, in units of 1 / (2 * large)
    left = position // (2 * large)
    weight = position - left * 2 * large  # of the pixel to the right, out of 2 * large
    matrix = np.zeros((large, small), np.int64)
    np.add.at(matrix, (np.arange(large), left.clip(0, small - 1)), 2 * large - weight)
    np.add.at(matrix, (np.arange(large), (left + 1).clip(0, small - 1)), weight)
    scaled = np.einsum("yi,nij,xj->nyx", matrix, images, matrix) * 255
    unit = 16 * (2 * large) ** 2
    large_images: NDArray[np.uint8] = ((scaled + unit // 2) // unit).astype(np.uint8)
    return large_images


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = bytes((0, 0, dataset.UBYTE, array.ndim)) + b"".join(
        size.to_bytes(4, "big") for size in array.shape
    )
    files.write_bytes(path, header + array.tobytes())
