"""What every store of experiments can do, and which one MODEL_STORE names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ml.bundle import Experiment
from ml.errors import UserError

if TYPE_CHECKING:
    from ml.serve.settings import ServeSettings


class NotFound(UserError):
    """The store has no such model."""


class Unavailable(UserError):
    """The store does not answer, or not as it should."""


@dataclass(frozen=True)
class Listing:
    experiments: list[Experiment]
    unreadable: dict[str, str] = field(default_factory=dict)  # tag or folder → why
    aliases: dict[str, list[str]] = field(default_factory=dict)  # tag → names of the registry


class Store(Protocol):
    """A place with models. `tag` has passed ml.bundle.check_tag."""

    def listing(self) -> Listing:
        """Every model that is there, in any order. Raises Unavailable."""

    def fetch(self, tag: str, folder: Path, limit: int) -> str:
        """Put model.onnx (at most `limit` bytes), golden.npz and experiment.json into the empty `folder`.

        Returns the model's tag: another one where `tag` is an alias of the registry.
        Raises NotFound, Unavailable, or Refused when a file is none, or too long.
        """

    def newest(self) -> str:
        """The tag that is served when none is named. Raises NotFound when there is none."""


def open_store(settings: "ServeSettings", cache: Path) -> Store:
    """The store that MODEL_STORE names; `cache` is a folder for what need not be fetched twice."""
    name = settings.model_store
    if name.startswith(("mlflow+http://", "mlflow+https://")):
        from ml.serve.store.registry import RegistryStore

        return RegistryStore(name.removeprefix("mlflow+"), settings)
    if name.startswith("git+"):
        from ml.serve.store.git_tags import GitStore

        return GitStore(name.removeprefix("git+"), settings.dvc_remote_url, cache)
    if "://" in name:
        raise UserError(
            f"MODEL_STORE {name!r} is unknown. Use a folder, git+PATH_OR_URL, or mlflow+http(s)://HOST."
        )
    from ml.serve.store.directory import DirectoryStore

    return DirectoryStore(Path(name))
