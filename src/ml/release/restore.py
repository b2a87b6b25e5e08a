"""Bring a stage's outputs back instead of running it, where something vouches for them."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dvc.dependency.param import ParamsDependency
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.loader import StageLoader

from ml.errors import UserError
from ml.release import provenance
from ml.release.provenance import Entry, StoredObject, key_of, receipt_path, record_path, value_of
from ml.release.receipt import StageReceipt, parse_stage
from ml.remotes import Place


@dataclass(frozen=True)
class Found:
    """A result of the same inputs, and the remote that vouches for it."""

    entry: Entry
    place: str
    receipt: StageReceipt | None  # None: a run record alone, such as `dvc push --run-cache` leaves


def find(present: Entry, locked: Entry | None, where: list[Place]) -> tuple[Found | None, str]:
    """A result for these inputs that may be restored; without one, why not.

    dvc.lock's own entry counts where a remote has its run record: a merge of git's can forge an entry, and nobody has
    run that. Any other record has to have a pipeline's receipt, or it may be anybody's.
    """
    key = key_of(present)
    if locked is not None and key_of(locked) == key:
        value = value_of(locked)
        for place in where:
            record = provenance.parse_record(place.read(record_path(key, value)), key, value)
            if record is not None:
                receipt = parse_stage(place.read(receipt_path(key, value)), key, value)
                return Found(locked, place.name, receipt), ""
    for place in where:
        for entry in candidates(place, key):
            value = value_of(entry)
            receipt = parse_stage(place.read(receipt_path(key, value)), key, value)
            if receipt is not None:
                return Found(entry, place.name, receipt), ""
    if locked is None:
        return None, "it never ran"
    if key_of(locked) == key:
        return None, "dvc.lock has a result, and no remote has the record of such a run"
    return None, "its inputs changed"


def candidates(place: Place, key: str) -> list[Entry]:
    """Results for this key at a place: its run records, and its last dvc.lock (all that HTTP has)."""
    folder = f"runs/{key[:2]}/{key}"
    records = [
        provenance.parse_record(place.read(f"{folder}/{value}"), key, value) for value in place.names(folder)
    ]
    last: dict[str, Entry] = {}
    if not place.lists and (content := place.read("dvc.lock")) is not None:
        try:
            last = provenance.parse_entries(content, f"dvc.lock on remote {place.name}")
        except UserError:
            pass  # torn: as if it were not there
    return [entry for entry in [*records, *last.values()] if entry is not None and key_of(entry) == key]


def fetch(repo: Repo, wanted: Iterable[StoredObject], where: list[Place]) -> list[provenance.Damage]:
    """Download into the cache what is not rightly there, each object checked; those that cannot be had."""
    distinct = {each.md5: each for each in wanted}.values()
    cache = repo.cache.local
    for damage in provenance.damaged_in_cache(repo, distinct):
        Path(cache.oid_to_path(damage.md5)).unlink()
    todo = [each for each in distinct if not Path(cache.oid_to_path(each.md5)).is_file()]
    for place in where:
        there = place.sizes(each.md5 for each in todo)
        here = [each.md5 for each in todo if each.md5 in there]
        if here:
            try:
                paths = [place.object_path(md5) for md5 in here]
                cache.add(paths, place.remote.fs, here, check_exists=False, on_error=ignore)
            except Exception as error:  # each kind of remote raises its own
                raise place.error("give an object", error) from error
        for damage in provenance.damaged_in_cache(repo, [each for each in todo if each.md5 in there]):
            Path(cache.oid_to_path(damage.md5)).unlink()
        todo = [each for each in todo if not Path(cache.oid_to_path(each.md5)).is_file()]
    return [provenance.Damage(each.md5, each.path, "is missing or damaged on every remote") for each in todo]


def ignore(md5: str, error: BaseException) -> None:
    """What could not be fetched is found missing afterwards."""


def restore(repo: Repo, stage: PipelineStage, entry: Entry, where: list[Place]) -> list[provenance.Damage]:
    """Put the outputs of `entry` into the working folder and `entry` into dvc.lock; what could not be had, if any."""
    wanted, damages = provenance.objects(repo, entry["outs"], where)
    damages += fetch(repo, wanted, where)
    if not damages:
        StageLoader.fill_from_lock(stage, entry)
        checkout(stage)
        stage.dump(update_pipeline=False)
    return damages


def checkout(stage: PipelineStage) -> None:
    """Write the stage's outputs from the cache, in place of whatever is there."""
    try:
        with stage.repo.lock:
            stage.checkout(force=True)
    except Exception as error:
        raise UserError(
            f"The outputs of {stage.addressing} could not be put into the working folder ({type(error).__name__}: {error}). Make room, or mend "
            "the permissions."
        ) from error


def restore_sources(repo: Repo, stage: PipelineStage, where: list[Place]) -> list[provenance.Damage]:
    """Put the data of .dvc files that the stage reads into the working folder, where they are not; what is missing."""
    owners = [
        owner
        for dep in stage.deps
        if not isinstance(dep, ParamsDependency)
        and (owner := provenance.owner_of(repo, dep.fs_path)) is not None
        and not isinstance(owner.stage, PipelineStage)
        and (not owner.exists or owner.changed_checksum())
    ]
    paths = {provenance.relative(repo, owner) for owner in owners}
    wanted, damages = provenance.objects(
        repo, [each for each in provenance.sources(repo) if each["path"] in paths], where
    )
    damages += fetch(repo, wanted, where)
    if not damages:
        for owner in owners:
            checkout(owner.stage)
    return damages
