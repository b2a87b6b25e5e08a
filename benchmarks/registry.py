"""What the registry lets into production: complete releases, and releases with one piece removed or forged.

    python -m benchmarks.registry                 # 50 complete ones and every forgery, against a real MLflow server
    python -m benchmarks.registry --complete 10

Each version is registered as the release job does it, in a repository of its own with real git and DVC; then one thing is
done to it behind the registry's back, and `ml.promote` is asked to promote it.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml.tracking.model
from ml import bundle, files, promote
from ml.errors import UserError
from ml.settings import Settings
from ml.tracking import registry
from ml.tracking.store import MANIFEST, METRICS_FILE, Version, manifest
from tests import released
from tests.experiment import Experiment
from tests.mlflow_server import mlflow_server

MODEL, GOLDEN, EXPERIMENT = (f"bundle/{name}" for name in (bundle.MODEL, bundle.GOLDEN, bundle.EXPERIMENT))


@dataclass
class Case:
    """A registered version and the ways to tamper with it. `folder`: its files on the server's disk."""

    settings: Settings
    version: Version
    folder: Path
    experiment: Experiment

    @property
    def client(self) -> Any:
        return registry.connect(self.settings).client

    def tag(self, key: str, value: str | None) -> None:
        if value is None:
            self.client.delete_model_version_tag(self.version.name, self.version.version, key)
        else:
            self.client.set_model_version_tag(self.version.name, self.version.version, key, value)

    def file(self, name: str, content: bytes | None) -> None:
        if content is None:
            (self.folder / name).unlink()
        else:
            (self.folder / name).write_bytes(content)

    def edit(self, name: str, change: Callable[[Any], None]) -> None:
        """Change a JSON file in place."""
        tree = json.loads((self.folder / name).read_bytes())
        change(tree)
        files.write_json(self.folder / name, tree)

    def cover_up(self) -> None:
        """Make every hash that the registry keeps fit the files again."""
        self.tag("experiment_sha256", files.sha256(self.folder / EXPERIMENT))
        files.write_json(self.folder / MANIFEST, manifest(self.folder))
        self.tag("manifest_sha256", files.sha256(self.folder / MANIFEST))


Forgery = Callable[[Case], None]


def tag(key: str, value: str | None) -> Forgery:
    return lambda case: case.tag(key, value)


def json_tag(key: str, change: Callable[[Any], None]) -> Forgery:
    def forge(case: Case) -> None:
        tree = json.loads(case.version.tags[key])
        change(tree)
        case.tag(key, json.dumps(tree))

    return forge


def file(name: str, content: bytes | None) -> Forgery:
    return lambda case: case.file(name, content)


def flipped(name: str) -> Forgery:
    def forge(case: Case) -> None:
        content = bytearray((case.folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        case.file(name, bytes(content))

    return forge


def better_metrics(tree: Any) -> None:
    tree["accuracy"]["mean"] = 0.9999


def other_epochs(tree: Any) -> None:
    tree["train"]["epochs"] += 1


def metrics_everywhere(case: Case) -> None:
    json_tag("metrics", better_metrics)(case)
    case.edit(METRICS_FILE, better_metrics)
    case.edit(EXPERIMENT, lambda tree: better_metrics(tree["metrics"]))
    case.cover_up()


def params_everywhere(case: Case) -> None:
    json_tag("params", other_epochs)(case)
    case.edit(EXPERIMENT, lambda tree: other_epochs(tree["params"]))
    case.cover_up()


def model_everywhere(case: Case) -> None:
    """Other bytes, with every hash that can be changed changed to theirs."""
    case.file(MODEL, b"a model from somewhere else")
    sha256 = files.sha256(case.folder / MODEL)
    case.tag("model_sha256", sha256)
    case.client.set_tag(case.version.run_id, "model_sha256", sha256)
    case.edit(EXPERIMENT, lambda tree: tree.update(model={"sha256": sha256, "size": 27}))
    case.cover_up()


def everywhere(key: str, value: Callable[[Case], str]) -> Forgery:
    def forge(case: Case) -> None:
        case.tag(key, value(case))
        case.edit(EXPERIMENT, lambda tree: tree.update({key: value(case)}))
        case.cover_up()

    return forge


def other_commit(case: Case) -> str:
    """One that is in the repository, but had other results."""
    return case.experiment.git("rev-list", "--max-parents=0", "HEAD")


def delete_run(case: Case) -> None:
    case.client.delete_run(case.version.run_id)


def run_tag(value: str | None) -> Forgery:
    def forge(case: Case) -> None:
        if value is None:
            case.client.delete_tag(case.version.run_id, "model_sha256")
        else:
            case.client.set_tag(case.version.run_id, "model_sha256", value)

    return forge


def failed_run(case: Case) -> None:
    case.client.set_terminated(case.version.run_id, "FAILED")


def copied_by_hand(case: Case) -> None:
    """A version that somebody made with all tags and files of a good one, past the release job."""
    found = case.client.get_model_version(case.version.name, case.version.version)
    tags = {key: value for key, value in found.tags.items() if not key.startswith("trail.")}
    copy = case.client.create_model_version(found.name, found.source, run_id=found.run_id, tags=tags)
    case.version = Version(found.name, str(copy.version), found.run_id, "", tags)


def deleted_version(case: Case) -> None:
    case.client.delete_model_version(case.version.name, case.version.version)


def moved_git_tag(case: Case) -> None:
    case.experiment.git(
        "tag", "--force", "--annotate", case.version.tag, "--message", "moved", other_commit(case)
    )


def git_tag_of_other_bytes(case: Case) -> None:
    message = f"other\n\nModel-Sha256: {'0' * 64}\n"
    case.experiment.git("tag", "--force", "--annotate", case.version.tag, "--message", message)


REMOVED_TAGS = (
    *("git_commit", "data_hash", "lock_sha256", "model_sha256", "model_tag", "params", "metrics"),
    *("comment_url", "gate", "manifest_sha256", "experiment_sha256"),
)
FORGERIES: dict[str, Forgery] = {
    **{f"tag {key} removed": tag(key, None) for key in REMOVED_TAGS},
    "commit that does not exist": tag("git_commit", "0" * 40),
    "commit given as a branch": tag("git_commit", "HEAD"),
    "another real commit": lambda case: case.tag("git_commit", other_commit(case)),
    "another real commit everywhere": everywhere("git_commit", other_commit),
    "other data hash": tag("data_hash", "0" * 32 + ".dir"),
    "other data hash everywhere": everywhere("data_hash", lambda case: "0" * 32 + ".dir"),
    "other lock hash": tag("lock_sha256", "0" * 64),
    "other lock hash everywhere": everywhere("lock_sha256", lambda case: "0" * 64),
    "other model hash": tag("model_sha256", "0" * 64),
    "model of another release": tag("model_tag", "model-v9.9.9"),
    "model of another release everywhere": lambda case: everywhere("tag", lambda case: "model-v9.9.9")(case),
    "one param changed": json_tag("params", other_epochs),
    "one param changed everywhere": params_everywhere,
    "params that are no JSON": tag("params", "{epochs"),
    "params empty": tag("params", "{}"),
    "one metric changed": json_tag("metrics", better_metrics),
    "one metric changed everywhere": metrics_everywhere,
    "metrics empty": tag("metrics", "{}"),
    "comment that is no link": tag("comment_url", "see the chat"),
    "comment somewhere else": tag("comment_url", "https://example.com/g/proj/issues/3"),
    "comment of another merge request": tag(
        "comment_url", released.COMMENT.replace("merge_requests/3", "merge_requests/4")
    ),
    "gate failed": tag("gate", "failed"),
    "gate skipped": tag("gate", "skipped"),
    "bundle's model removed": file(MODEL, None),
    "one bit of the model flipped": flipped(MODEL),
    "another model": file(MODEL, b"a model from somewhere else"),
    "another model everywhere": model_everywhere,
    "golden images removed": file(GOLDEN, None),
    "one bit of the golden images flipped": flipped(GOLDEN),
    "experiment.json removed": file(EXPERIMENT, None),
    "experiment.json torn": file(EXPERIMENT, b'{"version": 1, "tag": "mod'),
    "experiment.json changed": lambda case: case.edit(
        EXPERIMENT, lambda tree: better_metrics(tree["metrics"])
    ),
    "MLmodel removed": file("MLmodel", None),
    "MLmodel changed": file("MLmodel", b"flavors: {}\n"),
    "network of the MLflow model removed": file("data/model.pt2", None),
    "network of the MLflow model changed": flipped("data/model.pt2"),
    "metrics file removed": file(METRICS_FILE, None),
    "metrics file changed": lambda case: case.edit(METRICS_FILE, better_metrics),
    "manifest removed": file(MANIFEST, None),
    "manifest changed": file(MANIFEST, b"{}"),
    "file smuggled in": file("data/more.pkl", b"cos\nsystem\n"),
    "run deleted": delete_run,
    "run of other bytes": run_tag("0" * 64),
    "run that names no bytes": run_tag(None),
    "run failed": failed_run,
    "version made by hand from a good one": copied_by_hand,
    "version deleted": deleted_version,
    "git tag moved": moved_git_tag,
    "git tag of other bytes": git_tag_of_other_bytes,
}


def cases(experiment: Experiment, settings: Settings, server: Path, first: int) -> Iterator[Case]:
    """Releases of the same result under one tag after the other, each complete."""
    for patch in range(first, 10_000):
        name = f"model-v1.0.{patch}"
        with chdir(experiment.folder):
            folder = bundle.write_bundle(Path("models"), name)
            experiment.git("tag", "--annotate", name, "--message", name)
            version = registry.register(settings, folder, comment_url=released.COMMENT, gate="passed",
                                        merge_request_url=released.MERGE_REQUEST)  # fmt: skip
            shutil.rmtree(folder)
        place = next(server.glob(f"artifacts/*/{version.run_id}/artifacts/registered/{name}"))
        yield Case(settings, version, place, experiment)


def promoted(case: Case) -> bool:
    with chdir(case.experiment.folder):
        try:
            promote.promote(case.settings, case.version.version, "staging", "benchmark", None)
        except UserError:
            return False
    return True


def complete(case: Case) -> bool:
    with chdir(case.experiment.folder), registry.reaching(case.settings, "checking") as reg:
        state = reg.state()
        found = promote.findings(reg, reg.version(case.version.version), state, case.settings)
    return not any(each.problem for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry", description=__doc__)
    parser.add_argument("--complete", type=int, default=50, help="complete releases to promote (50)")
    count = parser.parse_args().complete
    ml.tracking.model.save_model = released.fake_flavours  # the flavours are measured by benchmarks.tracking
    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder, "server")) as address:
        settings = released.settings_for(address)
        experiment = released.make_released(Path(folder, "repo"))
        released.release(experiment, "model-v0.9.0", wrong=0.2)  # a commit with other results
        released.release(experiment, "model-v1.0.0", settings=settings)
        made = cases(experiment, settings, Path(folder, "server"), first=1)
        start = time.monotonic()
        passed = [case for case in (next(made) for _ in range(count)) if promoted(case) and complete(case)]
        seconds = time.monotonic() - start
        through = []
        for name, forge in FORGERIES.items():
            case = next(made)
            forge(case)
            if promoted(case):
                through.append(name)
    print(
        f"complete releases promoted, trace whole afterwards: {len(passed)} of {count} ({seconds / max(count, 1):.1f} s each)"
    )
    print(f"with one piece removed or forged, promoted: {len(through)} of {len(FORGERIES)} {through or ''}")


if __name__ == "__main__":
    main()
