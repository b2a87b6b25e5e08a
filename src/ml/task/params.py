"""The task's own sections of params.yaml. ★ A team replaces this module."""

from typing import Annotated, Literal

from pydantic import Field

from ml.section import Section


class LoadParams(Section):
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits", "custom"]


class ModelParams(Section):
    channels: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
