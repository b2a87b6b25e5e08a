"""Push, judge and restore over the remote that the environment names: `python -m tests.remote_journey PROJECT FOLDER`.

A process of its own, since the clients of most remotes leave their connections open until it ends.
"""

import os
import sys
from pathlib import Path

from ml.release import lock_gate, pipeline, preflight, provenance, push, remote
from ml.release.receipt import StageRecord
from ml.settings import load_settings
from tests.dvc_project import Project


def journey(finished: Project, folder: Path) -> None:
    os.chdir(finished.folder)
    settings = load_settings()
    preflight.check(settings)
    found("pushed", push.push("main", settings))
    found("pushed again", push.push("main", settings))
    found("whole on the remote", provenance.verify_outputs("main"))

    main = finished.clone(folder / "main")  # another machine, on main
    os.chdir(main.folder)
    remote.configure(settings)
    found("faults of main's lock", lock_gate.judge())
    found("main", how(pipeline.reproduce(settings)))
    found("main's changes", main.git("status", "--short"))

    request = finished.clone(folder / "request")  # a merge request that changes a param
    request.set_param("evaluate.digits", 3)
    os.chdir(request.folder)
    os.environ["CI_MERGE_REQUEST_IID"] = "7"
    settings = load_settings()
    preflight.check(settings)
    stages = pipeline.reproduce(settings, push_to="merge-request")
    pipeline.finish(stages, settings, "merge-request")
    found("merge request", how(stages))
    found("faults of its lock", lock_gate.judge())

    again = finished.clone(folder / "again")  # its next pipeline: nothing is left to run
    again.set_param("evaluate.digits", 3)
    os.chdir(again.folder)
    remote.configure(settings)
    found("its next pipeline", how(pipeline.reproduce(settings, allow_run=False)))

    # it is merged: main's release job reads its prefix, and writes to main
    release = finished.clone(folder / "release")
    release.set_param("evaluate.digits", 3)
    os.chdir(release.folder)
    del os.environ["CI_MERGE_REQUEST_IID"]
    settings = load_settings()
    remote.configure(settings, merge_request=7)
    stages = pipeline.reproduce(settings, allow_run=False)
    found("release", how(stages))
    found("release pushed", push.push("main", settings, stages))
    found("whole on the remote", provenance.verify_outputs("main"))


def how(stages: list[StageRecord]) -> list[str]:
    return [f"{stage.how} {stage.place}" for stage in stages]


def found(what: str, value: object) -> None:
    """For the test to judge."""
    print(f"journey: {what}: {value}", flush=True)


if __name__ == "__main__":
    journey(Project(Path(sys.argv[1])), Path(sys.argv[2]))
