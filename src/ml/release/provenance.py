"""What vouches for dvc.lock: run records, receipts and stored objects, read from the remotes without the data.

A stage's entry in dvc.lock has a key (hash of command, deps, params and the outputs' names) and a value (hash of the
whole entry). DVC writes a run record `runs/KEY/VALUE` for each run; a pipeline adds `receipts/KEY/VALUE.json`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.reproduce import get_active_graph, plan_repro
from dvc.stage import PipelineStage
from dvc.stage.serialize import to_single_stage_lockfile
from dvc.utils import dict_sha256
from dvc.utils.serialize import dumps_yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ml import files
from ml.errors import UserError
from ml.lock import LOCK, parse_lock
from ml.remotes import RUNS, Place, named, places

Entry = dict[str, Any]  # of a stage in dvc.lock: cmd, deps, params, outs
NOT_HASHED = ["size", "nfiles"]  # DVC leaves them out of a key and a value


@dataclass(frozen=True)
class StoredObject:
    """What an output consists of in the cache and on a remote; size in bytes where dvc.lock says it."""

    md5: str  # of a folder: ending in .dir
    size: int | None
    path: str  # of the output


@dataclass(frozen=True)
class Damage:
    md5: str
    path: str  # of the output
    problem: str

    def __str__(self) -> str:
        return f"{self.path} (object {self.md5}) {self.problem}"


def read_entries(path: Path = Path(LOCK)) -> dict[str, Entry]:
    """Stages of dvc.lock as they are written; none when there is no dvc.lock. Raises UserError when it is damaged."""
    return parse_entries(path.read_bytes(), str(path)) if path.exists() else {}


def parse_entries(content: bytes, source: str) -> dict[str, Entry]:
    parse_lock(content, source)  # raises UserError
    stages: dict[str, Entry] = YAML(typ="safe").load(content.decode("utf-8"))["stages"]
    return stages


def key_of(entry: Entry) -> str:
    named = {**entry, "outs": [out["path"] for out in entry.get("outs", [])]}
    return str(dict_sha256(named, exclude=NOT_HASHED))


def value_of(entry: Entry) -> str:
    return str(dict_sha256(entry, exclude=NOT_HASHED))


def record_path(key: str, value: str) -> str:
    return f"{RUNS}/{key[:2]}/{key}/{value}"


def receipt_path(key: str, value: str) -> str:
    return f"receipts/{key[:2]}/{key}/{value}.json"


def record_bytes(entry: Entry) -> bytes:
    """A run record as DVC writes it."""
    return str(dumps_yaml(entry)).encode()


def parse_record(content: bytes | None, key: str, value: str) -> Entry | None:
    """None when its content is not what its name says: it was damaged or forged."""
    try:
        entry = YAML(typ="safe").load((content or b"").decode("utf-8"))
        return entry if key_of(entry) == key and value_of(entry) == value else None
    except (YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError):
        return None


# --- the pipeline as it is in the working folder


def pipeline_stages(repo: Repo) -> list[PipelineStage]:
    """Those of dvc.yaml that are not frozen, each after what it depends on.

    Raises:
        UserError: DVC cannot read dvc.yaml, dvc.lock or a .dvc file, or the stages go in a circle.
    """
    try:
        graph = get_active_graph(repo.index.graph)
        planned = plan_repro(graph, list(repo.index.stages))
    except DvcException as error:
        raise UserError(
            f"DVC cannot read the pipeline ({type(error).__name__}: {error}). Correct dvc.yaml, or take {LOCK} and "
            "the .dvc files from the target branch (`git checkout origin/main -- dvc.lock`)."
        ) from error
    return [stage for stage in planned if isinstance(stage, PipelineStage) and not stage.frozen]


def can_be_recorded(stage: PipelineStage) -> bool:
    """Whether inputs and outputs of a stage determine its run, as DVC's own run-cache asks."""
    return bool(
        stage.deps
        and stage.outs
        and not stage.always_changed
        and all(dep.protocol == "local" for dep in stage.deps)
        and all(out.protocol == "local" and out.use_cache and not out.persist for out in stage.outs)
    )


def present_entry(repo: Repo, stage: PipelineStage, where: list[Place]) -> Entry | None:
    """The entry that the stage would have now, but for its outputs' hashes; None while an input is not known yet.

    An input that a stage or a .dvc file makes counts with the hash that is recorded for it, wherever its bytes are.

    Raises:
        UserError: a source file is missing, or a param.
    """
    for dep in stage.deps:
        if not isinstance(dep, ParamsDependency) and (owner := owner_of(repo, dep.fs_path)) is not None:
            found = recorded_hash(repo, owner, dep.fs_path, where)
            if found is None:
                return None
            dep.hash_info, dep.meta = found
        else:
            try:
                dep.save()
            except (
                Exception
            ) as error:  # DependencyDoesNotExistError, MissingParamsError, a params.yaml that is none
                raise UserError(f"Stage {stage.name}: {error}.") from None
    entry: Entry = json.loads(json.dumps(to_single_stage_lockfile(stage)))
    return entry


def owner_of(repo: Repo, path: str) -> Any:
    """The output (of a stage or a .dvc file) that is or holds `path`; None for a source file."""
    for out in repo.index.outs:
        if out.protocol == "local" and (path == out.fs_path or out.fs.isin(path, out.fs_path)):
            return out
    return None


def recorded_hash(repo: Repo, owner: Any, path: str, where: list[Place]) -> Any:
    """Hash and meta of an output, or of a path in it; None when it is not known."""
    if not owner.hash_info:
        return None
    if path == owner.fs_path:
        return owner.hash_info, owner.meta
    fetch_folder(repo, owner.hash_info.value, where)
    inside = owner.get_obj(filter_info=path)
    return (inside.hash_info, owner.meta) if inside else None


# --- objects


def fetch_folder(repo: Repo, md5: str, where: list[Place]) -> list[dict[str, str]] | None:
    """The list of a folder's files ({md5, relpath}), into the cache too; None when no place has it, or none rightly."""
    cached = Path(repo.cache.local.oid_to_path(md5))
    content = cached.read_bytes() if cached.is_file() else None
    if content is None or not is_object(content, md5):
        for place in where:
            content = place.read_object(md5)
            if content is not None and is_object(content, md5):
                break
        else:
            return None
        if cached.exists():
            cached.unlink()
        files.write_bytes(cached, content)
    members: list[dict[str, str]] = json.loads(content)
    return members


def is_object(content: bytes, md5: str) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5.removesuffix(".dir")


def objects(
    repo: Repo, outs: Iterable[dict[str, Any]], where: list[Place]
) -> tuple[list[StoredObject], list[Damage]]:
    """What `outs` (entries of dvc.lock or a .dvc file) consist of, members of folders included, and what is missing."""
    found, damages = [], []
    for out in outs:
        md5, path, size = str(out.get("md5")), str(out["path"]), out.get("size")
        if not md5.endswith(".dir"):
            found.append(StoredObject(md5, size, path))
            continue
        found.append(StoredObject(md5, None, path))
        members = fetch_folder(repo, md5, where)
        if members is None:
            damages.append(Damage(md5, path, "is missing or damaged: nobody can tell what the folder holds"))
            continue
        if out.get("nfiles", len(members)) != len(members):
            damages.append(Damage(md5, path, f"holds {len(members)} files, and {LOCK} says {out['nfiles']}"))
        found += [StoredObject(each["md5"], None, f"{path}/{each['relpath']}") for each in members]
    return found, damages


def sources(repo: Repo) -> list[dict[str, Any]]:
    """Outputs of .dvc files, as they are written there with the path from the root."""
    return [
        {"path": relative(repo, out), "md5": out.hash_info.value, **out.meta.to_dict()}
        for stage in repo.index.stages
        if not isinstance(stage, PipelineStage)
        for out in stage.outs
        if out.use_cache and out.is_in_repo and out.hash_info
    ]


def relative(repo: Repo, out: Any) -> str:
    return Path(out.fs_path).relative_to(repo.root_dir).as_posix()


def lock_outs(entries: dict[str, Entry]) -> list[dict[str, Any]]:
    return [out for entry in entries.values() for out in entry.get("outs", [])]


def missing(repo: Repo, wanted: Iterable[StoredObject], where: Iterable[Place]) -> list[Damage]:
    """Objects that are at none of the places, or there with another size only. Nothing is downloaded."""
    wanted = list(wanted)
    known = [place.sizes(each.md5 for each in wanted) for place in where]
    damages = []
    for each in wanted:
        sizes = [found[each.md5] for found in known if each.md5 in found]
        if not sizes:
            damages.append(Damage(each.md5, each.path, "is missing"))
        elif each.size is not None and all(size not in (None, each.size) for size in sizes):
            damages.append(Damage(each.md5, each.path, f"has {sizes[0]} bytes, and {LOCK} says {each.size}"))
    return damages


def damaged_in_cache(repo: Repo, wanted: Iterable[StoredObject]) -> list[Damage]:
    """Objects of the local cache whose bytes are not those of their name. Those that are not there are not named."""
    damages = []
    for each in wanted:
        path = Path(repo.cache.local.oid_to_path(each.md5))
        # not DVC's own check, which trusts size, inode and time where it has seen the file before
        if path.is_file() and files.md5(path) != each.md5.removesuffix(".dir"):
            damages.append(Damage(each.md5, each.path, "is damaged in the cache"))
    return damages


def changed_in_workspace(wanted: Iterable[StoredObject]) -> list[Damage]:
    """Files of the working folder that are not those of dvc.lock. Those that are not there are not named."""
    return [
        Damage(each.md5, each.path, "is changed in the working folder")
        for each in wanted
        if Path(each.path).is_file() and files.md5(Path(each.path)) != each.md5
    ]


def damaged_at(place: Place, wanted: Iterable[StoredObject]) -> list[Damage]:
    """Objects that are missing at the place or have other bytes than their name says: each is read wholly."""
    damages = []
    for each in wanted:
        try:
            found = place.hash_object(each.md5)
        except Exception as error:  # each kind of remote raises its own
            place.raise_unless_absent(error, each.path)
            damages.append(Damage(each.md5, each.path, f"is missing on remote {place.name}"))
            continue
        if found != each.md5.removesuffix(".dir"):
            damages.append(Damage(each.md5, each.path, f"is damaged on remote {place.name}"))
    return damages


def verify_outputs(name: str | None = None) -> int:
    """Hash every object of dvc.lock and of the .dvc files anew; how many there are.

    Args:
        name: the remote to read them from; None: the local cache, where each has to be, and the working folder.

    Raises:
        UserError: an object is missing or has other bytes than its name says; all are listed.
    """
    with Repo() as repo:
        where = places(repo)
        outs = lock_outs(read_entries()) + (sources(repo) if name else [])
        wanted, damages = objects(
            repo, outs, where if name else []
        )  # without remotes nothing is mended on the way
        if name is None:
            damages += damaged_in_cache(repo, wanted)
            absent = [each for each in wanted if not Path(repo.cache.local.oid_to_path(each.md5)).is_file()]
            damages += [Damage(each.md5, each.path, "is not in the cache") for each in absent]
            damages += changed_in_workspace(wanted)
        else:
            damages += damaged_at(named(where, name), wanted)
    if damages:
        listed = "\n".join(f"  {damage}" for damage in sorted(set(damages), key=str)[:20])
        raise UserError(
            f"{len(set(damages))} of {len(wanted)} objects of {LOCK} cannot be used:\n{listed}\n"
            + (
                f"Delete them from the remote {name} and push again from a machine that has them right."
                if name
                else "Delete them from .dvc/cache/files/md5, then run `python -m ml.release.pipeline` again."
            )
        )
    return len(wanted)
