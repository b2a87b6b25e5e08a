"""What is known of a run only after `dvc repro`: dvc.lock with the hash of every input and output, and the bundle."""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from ml import files
from ml.bundle import EXPERIMENT, GOLDEN, MODEL, write_bundle
from ml.errors import UserError
from ml.git import head
from ml.lock import LOCK, read_lock
from ml.settings import Settings
from ml.tracking import runs
from ml.tracking.journal import now

CARD = files.REPORTS / "model_card.md"


def finish(settings: Settings) -> None:
    """Add to the last training's run, if dvc.lock is of that training; says so on stderr if it is not."""
    pointer = runs.read_pointer()
    try:
        lock = read_lock()
    except UserError as error:
        print(f"No run is finished: {error}", file=sys.stderr)
        return
    if pointer is None:
        print("No run is finished: nothing has been trained or evaluated here.", file=sys.stderr)
        return
    different = [path for path, md5 in pointer["outs"].items() if lock.outs.get(path) != md5]
    if different or not pointer["evaluated"]:
        why = f"{', '.join(different)} of it differ" if different else "it has not been evaluated"
        print(
            f"No run is finished: dvc.lock is not of the last run, {why}. Run `dvc repro`.", file=sys.stderr
        )
        return
    journal = runs.journal_of(pointer, settings)
    if journal is None:
        print("No run is finished: the last one was never recorded.", file=sys.stderr)
        return
    tags = {"lock_sha256": files.sha256(Path(LOCK))}
    for stage in lock.stages.values():
        tags |= {f"dvc.in.{path}": md5 for path, md5 in stage.deps.items() if path not in lock.outs}
        tags |= {f"dvc.out.{path}": md5 for path, md5 in stage.outs.items()}
    if data_hash := lock.sources.get(str(files.DATA)):
        tags["data_hash"] = data_hash
    with tempfile.TemporaryDirectory() as scratch:
        places = {LOCK: Path(LOCK), "dvc.yaml": Path("dvc.yaml")}
        with suppress(UserError):  # no git, or a result is missing: then there is no bundle
            bundle = write_bundle(Path(scratch), f"run-{head()[:8]}")
            places |= {f"bundle/{name}": bundle / name for name in (MODEL, GOLDEN, EXPERIMENT)}
        if CARD.is_file():
            places[f"reports/{CARD.name}"] = CARD
        journal.add_files({place: path for place, path in places.items() if path.is_file()})
    journal.append(tags=tags)
    journal.append(status="FINISHED", time=now())
