"""params.yaml as a frozen, typed `Params`. There are no defaults here: what is not in the file is an error."""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from ml.errors import UserError, exit_on_user_error
from ml.section import Section
from ml.task.params import LoadParams as LoadParams
from ml.task.params import ModelParams as ModelParams

PARAMS_FILE = Path("params.yaml")


def differ(seeds: list[int]) -> list[int]:
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"must differ from each other, found {seeds}")
    return seeds


Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]


class PreprocessParams(Section):
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    split_seed: Annotated[int, Field(ge=0)]


class TrainParams(Section):
    launcher: Annotated[str, Field(pattern=r"^(python|torchrun( [\w./:=-]+)*)$")]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1), AfterValidator(differ)]
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)]
    schedule: Literal["constant", "triangular", "cosine"]
    warmup_fraction: Fraction
    label_smoothing: Fraction
    shift_pixels: Annotated[int, Field(ge=0, le=8)]
    log_every: Annotated[int, Field(ge=1)]
    checkpoint_seconds: Annotated[float, Field(ge=0)]
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "float32", "bfloat16"]
    threads: Annotated[int, Field(ge=1)]


Bins = Annotated[int, Field(ge=2, le=100)]


class EvaluateParams(Section):
    resamples: Annotated[int, Field(ge=100)]
    calibration_bins: Bins
    worst_mistakes: Annotated[int, Field(ge=1, le=400)]


class ReportParams(Section):
    primary_metric: str
    margin: Annotated[float, Field(ge=0)]
    assumed_seed_std: Annotated[float, Field(gt=0)]
    when_undecided: Literal["pass", "block"]
    sheet_examples: Annotated[int, Field(ge=1, le=200)]


class Params(Section):
    load: LoadParams
    preprocess: PreprocessParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    report: ReportParams


class BinsParams(BaseModel):
    """What a report needs of `evaluate`, which has whatever keys the stage has."""

    model_config = Section.model_config | ConfigDict(extra="ignore")

    calibration_bins: Bins


class JudgeParams(BaseModel):
    """What those read who judge a checkout: they are of another version than its stages, whose sections may differ."""

    model_config = Section.model_config | ConfigDict(extra="ignore")

    evaluate: BinsParams
    report: ReportParams


P = TypeVar("P", bound=BaseModel)


def parse_params(raw: object, source: str, kind: type[P]) -> P:
    """Check a params tree, listing every problem at once with the path of its key.

    Raises UserError naming `source`, the keys, what was found and what is allowed.
    """
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{source}: expected sections {', '.join(kind.model_fields)}, found {found}.")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            message = problem["msg"].removeprefix("Value error, ")
            message = {"missing": "is missing", "extra_forbidden": "is not a known key"}.get(
                problem["type"], message
            )
            found = (
                "" if problem["type"] in ("missing", "value_error") else f" (found: {problem['input']!r:.80})"
            )
            lines.append(f"  {key}: {message}{found}")
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise UserError(f"{source} has {count}; nothing was run:\n" + "\n".join(lines)) from None


def read_yaml(path: Path) -> Any:
    """The parsed file, by YAML 1.2 as DVC reads it (so 1e-3 is a number), comments kept for writing it back."""
    try:
        return YAML().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run from the root of the repository.") from None
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}.") from None
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, no such day, !!int "x"
        raise UserError(f"{path} is not valid YAML: {error}") from None


def plain(node: Any) -> Any:
    """Replace ruamel's commented containers and scalars by plain Python ones."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    if isinstance(node, ScalarBoolean):  # ruamel's true or false with an anchor, an int to Python
        return bool(node)
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Raises UserError when the file is missing, is not YAML, or does not fit `Params`."""
    return parse_params(plain(read_yaml(path)), str(path), Params)


def load_judge_params(path: Path = PARAMS_FILE) -> JudgeParams:
    """Raises UserError when the file is missing, is not YAML, or lacks what a report needs."""
    return parse_params(plain(read_yaml(path)), str(path), JudgeParams)


def apply_preset(preset: Path, path: Path = PARAMS_FILE) -> Params:
    """Write the values of `preset` into params.yaml, keeping its comments and its other values.

    Nothing is written unless the result is valid.
    """
    tree, overrides = read_yaml(path), plain(read_yaml(preset))
    if not isinstance(overrides, dict) or not all(
        isinstance(section, dict) for section in overrides.values()
    ):
        raise UserError(f"{preset}: expected sections with keys, like those of {path}.")
    parse_params(plain(tree), str(path), Params)
    for section, values in overrides.items():
        if section not in tree:
            raise UserError(f"{preset}: {section} is not a section of {path}.")
        for key, value in values.items():
            if isinstance(value, list) and isinstance(tree[section].get(key), list):
                tree[section][key][:] = value  # the list in the file stays on its line, before its comment
            else:
                tree[section][key] = value
    params = parse_params(plain(tree), f"{path} with {preset}", Params)
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 10_000  # no value is broken over two lines
    yaml.dump(tree, text)
    written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        written.write_text(text.getvalue(), encoding="utf-8")
        written.replace(path)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written: {error.strerror}. It is unchanged.") from error
    return params


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.params", description="Check params.yaml, or apply a preset."
    )
    parser.add_argument("--preset", type=Path, help="YAML file whose values replace those in params.yaml")
    arguments = parser.parse_args()
    if arguments.preset:
        apply_preset(arguments.preset)
        print(f"{PARAMS_FILE} now has the values of {arguments.preset}.", file=sys.stderr)
    else:
        load_params()
        print(f"{PARAMS_FILE} is valid.", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
