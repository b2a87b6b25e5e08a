"""How many requests and seconds a Google Drive remote takes: the unmodified dvc-gdrive against an emulated Drive.

    python -m benchmarks.gdrive [--objects 200]

The journey: preflight, push, judge and restore on main, run and push in a merge request, restore in its next pipeline, release
to main. Then DVC alone pushes and pulls that many small files. Google answers in a fraction of a second, the emulator at once, so what
counts is requests; seconds are those of this machine.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from ml import files
from tests.drive_emulator.drive import GoogleDrive
from tests.drive_emulator.server import emulated_drive
from tests.dvc_project import Project, make_project

RESULT = files.REPORTS / "bench" / "gdrive.json"
ROOT = Path(__file__).parents[1]
Figures = dict[str, float]


def journey(folder: Path, google: GoogleDrive, environment: dict[str, str]) -> Figures:
    """Raises AssertionError with its output when a step fails."""
    project = make_project(folder / "project")
    project.run("dvc", "repro")
    project.commit("lock")
    before, start = len(google.calls), time.monotonic()
    here = Project(ROOT, environment)
    said = here.run(sys.executable, "-m", "tests.remote_journey", str(project.folder), str(folder))
    seconds = time.monotonic() - start
    pushed = next(line for line in said.splitlines() if line.startswith("journey: pushed: "))
    return {
        "objects": int(pushed.rsplit(" ", 1)[1]),
        "seconds": seconds,
        "requests": len(google.calls) - before,
    }


def many(folder: Path, google: GoogleDrive, environment: dict[str, str], objects: int) -> dict[str, Figures]:
    """Push and pull by DVC alone, each in a process of its own."""
    project = make_project(folder / "many")
    for number in range(objects - 4):  # the project has three files, and their folder
        (project.folder / f"data/more-{number}.txt").write_text(f"{number}\n")
    project.run("dvc", "add", "--quiet", "data")
    project.commit("more data")
    project.environment = environment
    project.ml("preflight")
    other = project.clone(folder / "other")
    other.ml("remote")
    found = {}
    for name, clone, command in (("push", project, "push"), ("pull", other, "pull")):
        before, start = len(google.calls), time.monotonic()
        clone.run("dvc", command, "--quiet", "data")
        found[name] = {
            "objects": objects,
            "seconds": time.monotonic() - start,
            "requests": len(google.calls) - before,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gdrive", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--objects", type=int, default=200, help="small files to push and pull (200)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with emulated_drive(folder) as (google, environment):
            (folder / "key.json").write_text(json.dumps(google.service_account("runner")))
            drive = google.shared_drive(runner="fileOrganizer")
            environment |= {"GDRIVE_SERVICE_ACCOUNT_FILE": str(folder / "key.json")}
            urls = [{"DVC_REMOTE_URL": f"gdrive://{drive}/{name}"} for name in ("journey", "many")]
            figures = {"journey": journey(folder, google, environment | urls[0])}
            figures |= many(folder, google, environment | urls[1], arguments.objects)
    for name, each in figures.items():
        print(
            f"gdrive {name}: {each['objects']:g} objects, {each['seconds']:.1f} s, {each['requests']:g} requests"
        )
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(RESULT, figures)


if __name__ == "__main__":
    main()
