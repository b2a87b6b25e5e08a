"""The data of the task: a CSV file of flowers, four lengths and a species each.

The lengths come in cm with one digit, so in mm they are whole numbers up to 255: a flower is an "image" of 1×4
pixels, and everything behind `read_dataset` is the template's own.
"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ml import files, raw_data
from ml.errors import UserError, exit_on_user_error
from ml.examples import Dataset, example_ids
from ml.files import Examples
from ml.params import load_params

FEATURES = ("sepal_length", "sepal_width", "petal_length", "petal_width")  # cm
SPECIES = "species"
TEST_SHARE = 3  # every third flower of a species, after a shuffle, is a test example
MM_PER_CM = 10
LARGEST = 25.5  # cm


def read_dataset(folder: Path, name: str) -> Dataset:
    """Read `folder`/`name` and put a third of each species aside for the test.

    Raises:
        UserError: the file is missing, is no CSV, lacks a column, has a row that is too long or too short, a length
            that is no number of 0.0 to 25.5 cm with one digit, a flower without a species, or a species with fewer
            than TEST_SHARE different flowers.
    """
    path = folder / name
    rows = read_rows(path)
    lengths = in_millimetres(path, rows)
    class_names, labels = np.unique([row[SPECIES] for row in rows.values()], return_inverse=True)
    if len(class_names) < 2:
        raise UserError(
            f"{path}: the species are all {str(class_names[0])!r}. A classifier needs two or more."
        )
    images = lengths[:, None, :]  # (N, 1, 4)
    ids = example_ids(images)
    test = np.zeros(len(labels), bool)
    flowers = np.array([id.split("-")[0] for id in ids])
    for label, species in enumerate(class_names):
        different = np.unique(flowers[labels == label])
        if len(different) < TEST_SHARE:
            raise UserError(
                f"{path}: {species} has fewer than {TEST_SHARE} different flowers. Add some, or leave it out."
            )
        # By hash, not by row: a reordered file gives the same parts, and equal flowers are in the same one.
        test |= np.isin(flowers, different[::TEST_SHARE])

    def part(rows: NDArray[np.bool_]) -> Examples:
        return Examples(images[rows], labels[rows].astype(np.int64), ids[rows], class_names.astype(str))

    return Dataset(part(~test), part(test), (path,))


def read_rows(path: Path) -> dict[int, dict[str, str]]:
    """The rows by their line in the file; a column's name to its text."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # Excel puts a byte order mark in front
        reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        rows = {reader.line_num: row for row in reader}
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `make data`, or put the file there.") from None
    except (OSError, ValueError, csv.Error) as error:  # ValueError: not UTF-8
        raise UserError(f"{path} could not be read as CSV: {error}.") from None
    columns = list(reader.fieldnames or [])
    missing = [column for column in (*FEATURES, SPECIES) if columns.count(column) != 1]
    if missing:
        raise UserError(
            f"{path} has not exactly one column {', '.join(missing)} (found: {', '.join(columns) or 'nothing'}). "
            f"Expected {', '.join(FEATURES)}, {SPECIES}, separated by commas."
        )
    for line, row in rows.items():
        if None in row or None in row.values():
            raise UserError(
                f"{path}, line {line}: it has not as many values as there are columns ({len(columns)})."
            )
        row[SPECIES] = row[SPECIES].strip()
        if not row[SPECIES]:
            raise UserError(f"{path}, line {line}: {SPECIES} is empty. Name it, or leave the flower out.")
    if not rows:
        raise UserError(f"{path} has no rows.")
    return rows


def in_millimetres(path: Path, rows: dict[int, dict[str, str]]) -> NDArray[np.uint8]:
    """(N, 4) of 0..255."""
    lengths = np.zeros((len(rows), len(FEATURES)), np.uint8)
    for index, (line, row) in enumerate(rows.items()):
        for column, feature in enumerate(FEATURES):
            try:
                length = float(row[feature]) * MM_PER_CM
            except ValueError:
                length = -1.0
            if not (0 <= length <= 255 and abs(length - round(length)) < 1e-6):  # NaN is none of it
                raise UserError(
                    f"{path}, line {line}: {feature} is {row[feature]!r}; "
                    f"expected cm from 0.0 to {LARGEST} with one digit."
                )
            lengths[index, column] = round(length)
    return lengths


def write_iris(folder: Path) -> None:
    """Fisher's 150 irises, from scikit-learn's wheel, as `folder`/iris.csv."""
    from sklearn.datasets import load_iris

    bunch = load_iris()
    lines = [",".join((*FEATURES, SPECIES))]
    for lengths, target in zip(bunch.data, bunch.target):
        lines.append(",".join([*(f"{length:.1f}" for length in lengths), str(bunch.target_names[target])]))
    files.write_text(folder / "iris.csv", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ml.task.dataset", description="Get the raw data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    fetch = commands.add_parser("fetch", help="write iris.csv; needs no network")
    fetch.add_argument("--to", type=Path, required=True, metavar="DIR")
    commands.add_parser("restore", help="make data/ what data.dvc says: from DVC, else by fetch")
    arguments = parser.parse_args()
    if arguments.command == "fetch":
        write_iris(arguments.to)
    else:
        name = load_params().load.dataset
        raw_data.restore(name, write_iris if name == "iris.csv" else None)


if __name__ == "__main__":
    exit_on_user_error(main)
