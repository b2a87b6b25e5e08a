"""Put results on a remote: objects, run records and receipts; checked before and after."""

from collections.abc import Iterable
from pathlib import Path

from dvc.fs import localfs
from dvc.repo import Repo

from ml.errors import UserError
from ml.lock import LOCK
from ml.release import provenance
from ml.release.provenance import Entry, StoredObject, key_of, receipt_path, record_path, value_of
from ml.release.receipt import StageReceipt, StageRecord, parse_stage, stage_receipt
from ml.release.restore import fetch
from ml.remotes import Place, RemoteError, in_words, named, places, prepare, remedy_of
from ml.settings import Settings


def push(name: str, settings: Settings, stages: Iterable[StageRecord] = ()) -> int:
    """Make the remote hold all of dvc.lock: objects, data, run records, receipts, and dvc.lock itself.

    What only another remote has is copied. Can be repeated; what is rightly there is not sent again.

    Args:
        stages: what `ml.release.pipeline.reproduce` returned, for the receipts of those that ran.

    Returns:
        How many objects were sent.

    Raises:
        UserError: an object is damaged or missing, or the remote refuses.
    """
    ran = {stage.name for stage in stages if stage.how == "ran"}
    with Repo() as repo:
        where = places(repo)
        target = named(where, name)
        prepare(target, where)
        entries = provenance.read_entries()
        outs = provenance.lock_outs(entries) + provenance.sources(repo)
        sent = push_outs(repo, outs, target, where)
        for stage, entry in entries.items():
            receipt = stage_receipt(stage, key_of(entry), value_of(entry), settings) if stage in ran else None
            push_record(entry, receipt, target, where)
        target.write(LOCK, Path(LOCK).read_bytes())
    return sent


def push_outs(
    repo: Repo,
    outs: list[dict[str, object]],
    target: Place,
    where: list[Place],
    also: list[Place] | None = None,
) -> int:
    """Send the objects of `outs` that are neither at `target` nor at one of `also`; how many.

    Raises:
        UserError: one is damaged or missing here, or did not arrive.
    """
    wanted, damages = provenance.objects(repo, outs, where)
    wanted = list({each.md5: with_size(repo, each) for each in wanted}.values())
    there = {damage.md5 for damage in provenance.missing(repo, wanted, [target, *(also or [])])}
    todo = [each for each in wanted if each.md5 in there]
    damages += provenance.damaged_in_cache(repo, todo)
    if not damages:
        damages += fetch(repo, todo, [place for place in where if place != target])
    if damages:
        listed = "\n".join(f"  {damage}" for damage in damages[:20])
        raise UserError(
            f"Nothing was pushed to remote {target.name}, because {len(damages)} objects cannot be:\n{listed}\n"
            "Run `python -m ml.release.pipeline` again: it restores or makes them anew."
        )
    if not todo:
        return 0
    half_there = target.sizes(each.md5 for each in todo)
    for md5 in half_there:  # cut off by a crash: would pass for the whole
        target.remove(f"files/md5/{md5[:2]}/{md5[2:]}")
    # folders last: one that is there promises its files
    todo.sort(key=lambda each: each.md5.endswith(".dir"))
    failed: list[str] = []
    cache = repo.cache.local
    try:
        target.remote.odb.add(
            [cache.oid_to_path(each.md5) for each in todo],
            localfs,
            [each.md5 for each in todo],
            check_exists=False,
            verify=False,
            on_error=lambda md5, error: failed.append(in_words(error)),
        )
    except Exception as error:  # each kind of remote raises its own
        raise target.error("take an object", error) from error
    lost = provenance.missing(repo, [with_size(repo, each) for each in todo], [target])
    if failed or lost:
        said = "; ".join([*failed, *map(str, lost)][:5])
        raise RemoteError(
            f"The push to remote {target.name} ({target.url}) failed for {max(len(failed), len(lost))} of "
            f"{len(todo)} objects: {said}.\n{remedy_of(target.kind, said) or 'Check its credentials and room'} "
            "(`python -m ml.release.preflight` tries it), then run the job again."
        )
    return len(todo)


def with_size(repo: Repo, each: StoredObject) -> StoredObject:
    """With the size that the object has in the cache, if it is there."""
    path = Path(repo.cache.local.oid_to_path(each.md5))
    return StoredObject(each.md5, path.stat().st_size, each.path) if path.is_file() else each


def push_record(entry: Entry, receipt: StageReceipt | None, target: Place, where: list[Place]) -> None:
    """Write the stage's run record and receipt; a receipt that another place has is copied."""
    key, value = key_of(entry), value_of(entry)
    record = record_path(key, value)
    if provenance.parse_record(target.read(record), key, value) is None:
        target.write(record, provenance.record_bytes(entry))
    path = receipt_path(key, value)
    if receipt is None and parse_stage(target.read(path), key, value) is None:
        found = (parse_stage(place.read(path), key, value) for place in where if place != target)
        receipt = next((each for each in found if each), None)
    if receipt is not None:
        target.write(path, receipt.model_dump_json(indent=2).encode())
