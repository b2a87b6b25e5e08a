"""POST /invocations as MLflow's scoring server speaks it: the same bodies in, the same answers and errors out.

An example is an array (H, W) of pixels 0…255, or a row of H·W of them, as data frames have it. The answer is
{"predictions": [[probability of each class], …]}, in the order of the class names.
"""

import csv
import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.bundle import Experiment
from ml.serve.problems import Problem

FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")
CONTENT_TYPES = "application/json, text/csv"
ONE_OF = "The input must be a JSON dictionary with exactly one of the input fields " + ", ".join(FORMATS)


def bad(message: str, code: str = "BAD_REQUEST") -> Problem:
    """400 with MLflow's members beside those of RFC 9457."""
    return Problem(400, "bad-invocation", message, error_code=code, message=message)


def parse(body: bytes, content_type: str, experiment: Experiment, most: int) -> NDArray[np.uint8]:
    """The images (N, H, W) of a request. Raises Problem: 400 as MLflow does, 415, 413 for too many."""
    mime, *options = [part.strip() for part in content_type.split(";")]
    for option in options:
        name, _, value = option.partition("=")
        if name.lower() != "charset" or value.strip('"').lower() not in ("utf-8", "utf8"):
            raise unsupported("The scoring server only supports UTF-8.")
    if mime.lower() == "text/csv":
        rows = read_csv(body)
    elif mime.lower() == "application/json":
        rows = read_json(body)
    else:
        raise unsupported(
            f"This predictor only supports the following content types: {CONTENT_TYPES}. Got {mime[:80]!r}."
        )
    images = to_images(rows, experiment)
    if len(images) > most:
        raise Problem(
            413, "too-many-images", f"{len(images):,} examples in one request; at most {most:,} are taken."
        )
    return images


def unsupported(message: str) -> Problem:
    return Problem(415, "unsupported-media-type", message, error_code="BAD_REQUEST", message=message)


def read_csv(body: bytes) -> Any:
    try:
        _, *rows = csv.reader(io.StringIO(body.decode("utf-8")))
        return [[float(cell) for cell in row] for row in rows if row]
    except (ValueError, csv.Error) as error:
        raise bad(
            f"Failed to parse input as CSV with a header line and numbers. Error: {str(error)[:100]}"
        ) from None


def read_json(body: bytes) -> Any:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise bad(f"Ensure that input is a valid JSON formatted string. Error: {str(error)[:100]}") from None
    if not isinstance(document, dict):
        raise bad(f"{ONE_OF}. Received a {type(document).__name__}.")
    found = [name for name in FORMATS if name in document]
    if len(found) != 1:
        names = ", ".join(repr(str(name)[:40]) for name in list(document)[:10])
        raise bad(f"{ONE_OF}. Received dictionary with input fields: {names}.")
    value = document[found[0]]  # params and unknown fields are passed over, as MLflow does
    if found[0] == "dataframe_split":
        return read_split(value)
    if found[0] == "dataframe_records":
        return read_records(value)
    if found[0] == "instances" and isinstance(value, list) and value and isinstance(value[0], dict):
        return read_records(value)
    if isinstance(value, dict):  # named tensors; the model has one
        if len(value) != 1:
            raise bad(f"The model has one input, 'images'; received {len(value)}.")
        (value,) = value.values()
    return value


def read_split(value: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise bad(
            "dataframe_split must be a dictionary with 'columns' and 'data', as pandas' orient='split' gives."
        )
    if set(value) - {"columns", "data", "index"}:
        raise bad("dataframe_split may have the fields 'columns', 'data' and 'index' only.")
    rows, columns = value["data"], value.get("columns")
    if columns is not None and not all(isinstance(row, list) and len(row) == len(columns) for row in rows):
        raise bad(f"Every row of dataframe_split must have the {len(columns)} values that 'columns' names.")
    return [cells(row) for row in rows]


def read_records(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise bad("dataframe_records must be a list of dictionaries, as pandas' orient='records' gives.")
    if any(row.keys() != value[0].keys() for row in value):
        raise bad("Every record must have the same columns.")
    return [cells([row[column] for column in value[0]]) for row in value]


def cells(row: Any) -> Any:
    """A column whose cell is a whole image, or one column for each pixel."""
    return row[0] if isinstance(row, list) and len(row) == 1 and isinstance(row[0], list) else row


def to_images(rows: Any, experiment: Experiment) -> NDArray[np.uint8]:
    height, width = experiment.image_height, experiment.image_width
    wanted = f"(examples, {height}, {width}) or (examples, {height * width})"
    try:
        array = np.array(rows)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise bad(f"The examples are not of one shape. Wanted: {wanted}.") from None
    if array.dtype.kind not in "iuf":
        raise bad(f"The values must be numbers from 0 to 255. Wanted: {wanted}.")
    if array.shape == (height, width) and height > 1:
        array = array[None]
    size = height * width
    if (
        array.ndim < 2
        or array.shape[0] < 1
        or array[0].size != size
        or array.shape[1:]
        not in (
            (height, width),
            (size,),
            (1, height, width),
            (height, width, 1),
        )
    ):
        raise bad(f"Received shape {array.shape}; the model takes {wanted}.", "INVALID_PARAMETER_VALUE")
    if not ((array >= 0) & (array <= 255)).all() or (array.dtype.kind == "f" and (array % 1 != 0).any()):
        raise bad("The values must be whole numbers from 0 to 255: raw pixels, not normalised.")
    return np.ascontiguousarray(array.reshape(-1, height, width).astype(np.uint8))


def answer(probabilities: NDArray[np.float32]) -> bytes:
    return json.dumps({"predictions": probabilities.tolist()}).encode()
