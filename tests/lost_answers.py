"""An MLflow server that is lost right after it has done something: the answer never comes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def answers_lost(call: str) -> Iterator[None]:
    """Until the end of the block, every call of this name of MLflow's client is carried out, and then fails."""
    from mlflow.tracking import MlflowClient

    real = getattr(MlflowClient, call)

    def lost(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise ConnectionError("connection lost")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MlflowClient, call, lost)
        yield
