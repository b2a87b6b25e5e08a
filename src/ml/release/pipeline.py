"""The pipeline as a job runs it: restore what something vouches for, run the rest, push, leave a receipt.

    python -m ml.release.pipeline

Never commits: dvc.lock in the working folder and reports/receipt.json are the result, for the job to keep.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvc.repo import Repo
from dvc.stage import PipelineStage

from ml import files
from ml.errors import UserError, exit_on_user_error
from ml.lock import LOCK
from ml.release import provenance, push, receipt, remote, restore
from ml.release.clean import clean
from ml.release.provenance import Entry, key_of, value_of
from ml.release.receipt import StageRecord
from ml.remotes import Place, named, places, prepare
from ml.report import card
from ml.settings import Settings, load_settings

# With its own packages: PYTHONPATH is for the stages that it starts.
DVC = (sys.executable, "-E", "-P", "-m", "dvc")


class WouldRun(UserError):
    """A stage would have to run, and the caller does not allow it."""

    def __init__(self, stage: str, why: str) -> None:
        super().__init__(f"Stage {stage} would have to run: {why}.")
        self.stage = stage


def reproduce(
    settings: Settings,
    *,
    allow_run: bool = True,
    force: bool = False,
    push_to: str | None = None,
    with_remotes: bool = True,
) -> list[StageRecord]:
    """Bring every output of dvc.yaml into the working folder and dvc.lock up to date with it; a record per stage.

    What a stage made is pushed as soon as it ends, so that a job that dies later is no loss.

    Args:
        allow_run: False: raise WouldRun at the first stage that cannot be restored.
        force: run every stage, whatever could be restored.
        push_to: name of the remote that gets what ran here; None: none.
        with_remotes: False: neither restore nor push.

    Raises:
        UserError: a stage failed, data are missing, or a remote refuses.
    """
    shutil.rmtree(files.COST, ignore_errors=True)
    receipt.RECEIPT.unlink(missing_ok=True)
    with Repo() as repo:
        where = places(repo) if with_remotes else []
        names = [stage.name for stage in provenance.pipeline_stages(repo)]
    target = named(where, push_to) if push_to else None
    if target:
        prepare(target, where)
    if not names:
        raise UserError("dvc.yaml has no stages. Run from the root of the repository.")
    return [one_stage(name, settings, where, target, allow_run, force) for name in names]


def one_stage(
    name: str, settings: Settings, where: list[Place], target: Place | None, allow_run: bool, force: bool
) -> StageRecord:
    with Repo() as repo:  # anew for each stage: the one before has changed dvc.lock
        [stage] = [each for each in provenance.pipeline_stages(repo) if each.name == name]
        locked = provenance.read_entries().get(name)
        recorded = provenance.can_be_recorded(stage)
        present = provenance.present_entry(repo, stage, where) if recorded else None
        why = "it is forced to" if force else "nothing can tell that its result would be the same"
        if present is not None and not force:
            found, why = restore.find(present, locked, where)
            if found:
                damages = restore.restore(repo, stage, found.entry, where)
                if not damages:
                    return restored(name, found)
                why = "; ".join(map(str, damages[:3]))
        if not allow_run:
            raise WouldRun(name, why)
        say(f"{name}: runs, because {why}")
        provide_sources(repo, stage, where, settings)
    start = time.monotonic()
    entry = run(name, settings)
    seconds = time.monotonic() - start
    if present is not None and key_of(present) != key_of(entry):
        raise UserError(
            f"The inputs of stage {name} changed while it ran. Leave the folder alone, and run it again."
        )
    made = receipt.stage_receipt(name, key_of(entry), value_of(entry), settings)
    if target:
        with Repo() as repo:
            also = [place for place in where if place != target]
            push.push_outs(repo, entry["outs"] + data_of(repo, entry), target, where, also)
            push.push_record(entry, made, target, where)
    say(f"{name}: ran in {seconds:.1f} s" + (f", pushed to {target.name}" if target else ""))
    return StageRecord(
        name=name,
        key=made.key,
        value=made.value,
        how="ran",
        seconds=made.seconds,
        device=made.device,
        ran_in=made.job.url if made.job else None,
    )


def restored(name: str, found: restore.Found) -> StageRecord:
    by = found.receipt
    ran_in = by.job.url if by and by.job else None
    say(f"{name}: restored from {found.place}" + (f", where {ran_in} put it" if ran_in else ""))
    return StageRecord(
        name=name,
        key=key_of(found.entry),
        value=value_of(found.entry),
        how="restored",
        place=found.place,
        seconds=by.seconds if by else None,
        device=by.device if by else None,
        ran_in=ran_in,
    )


def data_of(repo: Repo, entry: Entry) -> list[dict[str, Any]]:
    """The outputs of .dvc files that the stage reads, wholly or in part."""
    read = [str(dep["path"]) for dep in entry.get("deps", [])]
    return [
        source
        for source in provenance.sources(repo)
        if any(path == source["path"] or path.startswith(f"{source['path']}/") for path in read)
    ]


def provide_sources(repo: Repo, stage: PipelineStage, where: list[Place], settings: Settings) -> None:
    """The data that the stage reads, from a remote, else as `make data` gets them. Raises UserError."""
    damages = restore.restore_sources(repo, stage, where)
    if not damages:
        return
    say(f"{stage.name}: {damages[0]}; trying what `make data` does")
    command = [sys.executable, "-P", "-m", "ml.task.dataset", "restore"]
    if subprocess.run(command, env=stage_environment(settings)).returncode:
        raise UserError(
            f"Stage {stage.name} cannot run: {damages[0]}. Its own message is above. "
            "Push the data from where they are (`dvc push`), to a remote that this job reads."
        )


def run(name: str, settings: Settings) -> Entry:
    """Run one stage by DVC, its output shown as it comes; its new entry in dvc.lock. Raises UserError."""
    # --no-run-cache: what may be restored has been decided, and a record left in the cache decides nothing
    command = ["repro", "--single-item", "--force", "--no-run-cache", name]
    sys.stderr.flush()
    done = subprocess.run([*DVC, *command], env=stage_environment(settings))
    if done.returncode:
        raise UserError(
            f"Stage {name} failed: `dvc {' '.join(command)}` ended with exit code {done.returncode}. "
            "What it said is above; nothing of it was pushed."
        )
    return provenance.read_entries()[name]


def stage_environment(settings: Settings) -> dict[str, str]:
    """Of what belongs to the task: the code is the checkout's, whatever package `ml` this process has."""
    code = os.pathsep.join(filter(None, [str(Path("src").resolve()), os.environ.get("PYTHONPATH")]))
    # a script may import what lies beside it, unlike the judge, for which the job sets this
    own = {"PYTHONPATH": code, "PYTHONSAFEPATH": "", "DVC_NO_ANALYTICS": "1"}
    return os.environ | own | ({} if is_recorded(settings) else {"TRACKING": "off"})


def is_recorded(settings: Settings) -> bool:
    """Whether MLflow gets a run: in a job only by MLFLOW_TRACKING_URI, as the database in its folder ends with it."""
    named = "mlflow_tracking_uri" in settings.model_fields_set
    return settings.tracking and (named or settings.ci_job_id is None)


def finish_run(settings: Settings) -> None:
    """Give the run in MLflow dvc.lock's hashes, bundle and model card; no failure of it costs the pipeline."""
    if not is_recorded(settings):
        say("No run is recorded in MLflow: MLFLOW_TRACKING_URI is not set, or TRACKING is off.")
        return
    with suppress(UserError):  # results that are not this template's have no card
        files.write_text(card.CARD, card.card(card.gather()))
    sys.stderr.flush()
    command = [sys.executable, "-P", "-m", "ml.tracking", "finish"]
    if subprocess.run(command, env=stage_environment(settings)).returncode:
        say(f"The run in MLflow was not finished. What is missing lies in {settings.tracking_folder}.")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def finish(stages: list[StageRecord], settings: Settings, push_to: str | None) -> receipt.Receipt:
    """Write the receipt; put it and dvc.lock on the remote, as the last result there."""
    written = receipt.write(stages, settings)
    if push_to:
        with Repo() as repo:
            target = named(places(repo), push_to)
        target.write(LOCK, Path(LOCK).read_bytes())
        target.write(receipt.RECEIPT.name, receipt.RECEIPT.read_bytes())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.release.pipeline", description="Restore, run, push, and leave a receipt."
    )
    parser.add_argument("--force", action="store_true", help="run every stage, whatever could be restored")
    parser.add_argument(
        "--without-remote", action="store_true", help="restore nothing and push nothing, as in a fork"
    )
    parser.add_argument("--merge-request", type=int, metavar="IID", help="restore from its prefix too")
    arguments = parser.parse_args()
    settings = load_settings()
    for line in clean():
        say(line)
    push_to = None if arguments.without_remote else remote.write_name(settings)
    if not arguments.without_remote:
        remote.configure(settings, arguments.merge_request)
    stages = reproduce(
        settings, force=arguments.force, push_to=push_to, with_remotes=not arguments.without_remote
    )
    written = finish(stages, settings, push_to)
    ran = [stage.name for stage in stages if stage.how == "ran"]
    if ran:
        finish_run(settings)
    say(
        f"{len(ran)} of {len(stages)} stages ran{': ' + ', '.join(ran) if ran else ''}. "
        f"Model {(written.model_sha256 or 'none')[:12]}; the receipt is {receipt.RECEIPT}."
    )


if __name__ == "__main__":
    exit_on_user_error(main)
