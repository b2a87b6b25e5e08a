"""The task's own sections of params.yaml."""

from typing import Annotated

from pydantic import Field

from ml.section import Section


class LoadParams(Section):
    dataset: Annotated[str, Field(pattern=r"^[\w-]+\.csv$")]


class ModelParams(Section):
    penalty: Annotated[float, Field(gt=0)]
    calibration_folds: Annotated[int, Field(ge=2)]
