"""dvc.lock: what each stage was made from, and what it made."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ml.errors import UserError

LOCK = "dvc.lock"
HASHES = ("md5", "etag", "checksum")  # of a file; of an address, by its server


@dataclass(frozen=True)
class StageLock:
    """Paths to MD5s (of folders: ending in .dir; of addresses: what their server says instead); params by dotted key."""

    command: str
    deps: dict[str, str]
    params: dict[str, Any]
    outs: dict[str, str]


@dataclass(frozen=True)
class Lock:
    stages: dict[str, StageLock]

    @property
    def outs(self) -> dict[str, str]:
        return {path: md5 for stage in self.stages.values() for path, md5 in stage.outs.items()}

    @property
    def params(self) -> dict[str, Any]:
        return {key: value for stage in self.stages.values() for key, value in stage.params.items()}

    @property
    def sources(self) -> dict[str, str]:
        """The deps that no stage makes: code, data and pinned packages."""
        deps = {path: md5 for stage in self.stages.values() for path, md5 in stage.deps.items()}
        return {path: md5 for path, md5 in deps.items() if path not in self.outs}


def parse_lock(content: bytes, source: str) -> Lock:
    """Raises UserError naming `source` when the content is not a dvc.lock of schema 2.0."""
    try:
        tree = YAML(typ="safe").load(content.decode("utf-8"))
        stages = {str(name): parse_stage(entry) for name, entry in tree["stages"].items()}
    except (
        YAMLError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{source} is not a dvc.lock ({type(error).__name__}: {error}). Run `dvc repro` and commit what it writes."
        ) from None
    return Lock(stages)


def parse_stage(entry: dict[str, Any]) -> StageLock:
    params: dict[str, Any] = {}
    for tree in entry.get("params", {}).values():
        params |= flat(tree)
    json.dumps(params, default=str)  # raises for what no report could show, such as a list within itself
    return StageLock(
        command=entry["cmd"] if isinstance(entry["cmd"], str) else " && ".join(entry["cmd"]),
        deps=dict(map(parse_file, entry.get("deps", []))),
        params=params,
        outs=dict(map(parse_file, entry.get("outs", []))),
    )


def parse_file(entry: dict[str, Any]) -> tuple[str, str]:
    """Path and hash. Raises KeyError when there is neither an MD5 nor what stands for it in the entry of an address."""
    kind = next((kind for kind in HASHES if kind in entry), "md5")
    return str(entry["path"]), str(entry[kind])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys. A list is a value."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return result


def read_lock(path: Path = Path(LOCK)) -> Lock:
    """That of the working folder."""
    try:
        return parse_lock(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Run `dvc repro` first.") from None
