"""The model registry of an MLflow server: versions with their whole trace, and the trail of their life cycle.

A version's artifacts are the MLflow model, the bundle that is served (bundle/), the metrics file (trace/metrics.json)
and the sha256 of all of them (trace/manifest.json). The trail is a run whose parameters are the entries: MLflow never
changes a parameter once it is logged, so of two people who write entry 7 at once only one does, and the other decides anew.

What GitLab's MLflow-compatible API lacks is in gitlab.py.
"""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ml import files
from ml.bundle import Experiment
from ml.errors import UserError
from ml.lock import flat
from ml.settings import Settings
from ml.tracking.client import experiment_id
from ml.tracking.lifecycle import STAGES, Action, Entry, Move, State, replay

METRICS_FILE = "trace/metrics.json"
MANIFEST = "trace/manifest.json"
ENTRY = re.compile(r"\d{6}")
ATTEMPTS = 50  # of appending to the trail while others append too
TRAIL_RUN = "trail"


@dataclass(frozen=True)
class Version:
    """`version`: "3"; on GitLab a semantic version. `uri`: for mlflow.pyfunc.load_model. `run_id`: the training's run."""

    name: str
    version: str
    run_id: str
    uri: str
    tags: dict[str, str]

    @property
    def tag(self) -> str:
        return self.tags.get("model_tag", "")


@dataclass(frozen=True)
class Change:
    """What is to be appended to the trail; who and when are added there."""

    action: Action
    moves: tuple[Move, ...]
    why: str
    accepted: str | None = None


class Registry:
    """The registered model `settings.mlflow_model_name` of an MLflow server. Every method may raise UserError."""

    def __init__(self, client: Any, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self.uri = settings.mlflow_tracking_uri
        self.name = settings.mlflow_model_name
        self._trail: str | None = None

    # ---- The trail

    def state(self) -> State:
        return replay(self.entries())

    def entries(self) -> list[Entry]:
        run_id = self.trail_run()
        if run_id is None:
            return []
        written = self.written(self.client.get_run(run_id))
        try:
            return [Entry.model_validate_json(written[key]) for key in sorted(written)]
        except ValidationError as error:
            raise UserError(f"The trail of {self.name} (run {run_id}) cannot be read: {error}") from None

    def written(self, run: Any) -> dict[str, str]:
        """The entries of the trail's run as they were written, by number."""
        return {key: value for key, value in run.data.params.items() if ENTRY.fullmatch(key)}

    def write(self, run_id: str, key: str, value: str) -> None:
        """Write an entry. Raises MlflowException when there is one of that number."""
        self.client.log_param(run_id, key, value)

    def trail_run(self, create: bool = False) -> str | None:
        """The run that holds the trail. Two at once may create one each: both then take the one that is in use, or older."""
        if self._trail is not None:
            return self._trail
        name = f"{self.name}-registry"
        if not create:  # whoever only reads may have no right to make an experiment
            found = self.client.get_experiment_by_name(name)
            self._trail = self._find_trail(found.experiment_id) if found else None
            return self._trail
        experiment = experiment_id(self.client, self.uri, name)
        self._trail = self._find_trail(experiment)
        if self._trail is None:
            run_id = self.client.create_run(experiment, run_name=TRAIL_RUN).info.run_id
            self.client.set_terminated(run_id)
            time.sleep(0.5)
            self._trail = self._find_trail(experiment) or run_id
        return self._trail

    def _find_trail(self, experiment: str) -> str | None:
        runs = [run for run in self.search_runs([experiment]) if run.info.run_name == TRAIL_RUN]
        runs.sort(key=lambda run: (not self.written(run), run.info.start_time, run.info.run_id))
        return str(runs[0].info.run_id) if runs else None

    def change(self, who: str, decide: Callable[[State], Change | None]) -> Entry | None:
        """Append what `decide` makes of the present state, and bring aliases and tags in line with the trail.

        `decide` is asked again whenever somebody else was faster; it refuses by UserError, and says None when there is
        nothing to change.
        """
        from mlflow.exceptions import MlflowException

        run_id = self.trail_run(create=True)
        assert run_id is not None
        for _ in range(ATTEMPTS):
            state = self.state()
            change = decide(state)
            if change is None:
                self.settle()
                return None
            entry = Entry(
                number=len(state.entries) + 1, when=datetime.now(UTC).isoformat(), who=who, **vars(change)
            )
            try:
                self.write(run_id, f"{entry.number:06d}", entry.to_json())
            except MlflowException:
                present = self.entries()
                if len(present) < entry.number:
                    raise  # nobody was faster: the server refuses for another reason
                if present[entry.number - 1] != entry:  # else it is ours, and only the answer was lost
                    continue
            self.settle()
            return entry
        raise UserError(
            f"The trail of {self.name} changed {ATTEMPTS} times meanwhile. Run the command again."
        )

    def settle(self) -> State:
        """Bring the aliases and tags in line with the trail, until it stays the same meanwhile."""
        from mlflow.exceptions import MlflowException

        state, failures = self.state(), 0
        while True:
            try:
                self.show(state)
            except MlflowException:  # two who set the same tag at once: one of them is refused
                failures += 1
                if failures == 5:
                    raise
                time.sleep(0.1 * failures)
                continue
            fresh = self.state()
            if len(fresh.entries) == len(state.entries):
                return fresh
            state = fresh

    def aliases(self) -> dict[str, str]:
        """The aliases as they are in the registry, whoever set them."""
        model = self.client.get_registered_model(self.name)
        return {alias: str(version) for alias, version in model.aliases.items() if alias in STAGES}

    def show(self, state: State) -> None:
        """Aliases, and on each version its stage and its part of the trail, for people and for serving."""
        aliases = self.aliases()
        for alias in STAGES:
            version = state.aliases.get(alias)
            if version is not None and aliases.get(alias) != version:
                self.client.set_registered_model_alias(self.name, alias, version)
            if version is None and alias in aliases:
                self.client.delete_registered_model_alias(self.name, alias)
        tags = {str(found.version): found.tags for found in self.search_versions("")}
        wanted = {(version, "stage"): str(stage) for version, stage in state.stages.items()}
        for entry in state.entries:
            for move in entry.moves:
                wanted[move.version, f"trail.{entry.number:06d}"] = entry.describe(move)
        for (version, key), value in wanted.items():
            if version in tags and tags[version].get(key) != value:
                self.client.set_model_version_tag(self.name, version, key, value)

    # ---- Versions

    def version(self, version: str) -> Version:
        from mlflow.exceptions import MlflowException

        try:
            return self._version(self.client.get_model_version(self.name, version))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise UserError(
                f"Version {version} of {self.name} is in the trail, but not in the registry: somebody deleted it."
            ) from None

    def _version(self, found: Any) -> Version:
        tags = {str(key): str(value) for key, value in found.tags.items()}
        uri = f"models:/{self.name}/{found.version}"
        return Version(self.name, str(found.version), found.run_id or "", uri, tags)

    def search_versions(self, and_filter: str) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_model_versions(f"name='{self.name}'{and_filter}", page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def unfinished(self, tag: str) -> Version | None:
        """The version of a registration that broke off before the trail knew of it."""
        found = sorted(
            self.search_versions(f" and tags.model_tag='{tag}'"), key=lambda each: int(each.version)
        )
        return self._version(found[0]) if found else None

    def create_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def add_version(
        self, tag: str, run_id: str, tags: dict[str, str], write: Callable[[Path], None]
    ) -> Version:
        """A new version; `write` makes its files in an empty folder. It is there as a whole or not at all."""
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            tags |= {"manifest_sha256": write_manifest(Path(folder))}
            self.client.log_artifacts(run_id, folder, f"registered/{tag}")
        source = f"{self.client.get_run(run_id).info.artifact_uri}/registered/{tag}"
        return self._version(
            self.client.create_model_version(self.name, source, run_id, tags, await_creation_for=0)
        )

    def remove_version(self, version: Version) -> None:
        self.client.delete_model_version(self.name, version.version)

    def download(self, version: Version, folder: Path) -> Path:
        """All files of the version into `folder`; where in it they lie."""
        from mlflow.artifacts import download_artifacts

        source = self.client.get_model_version_download_uri(self.name, version.version)
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=self.uri))

    # ---- Runs

    def search_runs(self, experiments: list[str], filter: str = "", **options: Any) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_runs(experiments, filter, max_results=200, page_token=token, **options)
            yield from page
            token = page.token
            if not token:
                return

    def training_runs(self, filter: str = "", **options: Any) -> Iterator[Any]:
        found = self.client.get_experiment_by_name(self.settings.mlflow_experiment_name)
        return self.search_runs([found.experiment_id], filter, **options) if found else iter(())

    def best_runs(self, metric: str, highest: bool) -> Iterator[Any]:
        return self.training_runs(order_by=[f"metrics.`{metric}` {'DESC' if highest else 'ASC'}"])

    def run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            found = None
        if found is None or found.info.lifecycle_stage != "active":
            raise UserError(f"There is no run {run_id!r} on the server (none, or deleted).")
        return found

    def find_run(self, experiment: Experiment) -> str | None:
        """The finished run that trained these bytes: of the released commit if there is one, else the latest.

        One whose params or metrics say something else is passed over: a section that the training does not depend on
        may have changed since.
        """
        runs = [
            run
            for run in self.training_runs(f"tags.model_sha256 = '{experiment.model.sha256}'")
            if run.data.tags.get("model_sha256") == experiment.model.sha256
            and run.info.status == "FINISHED"
            and agrees(run, experiment)
        ]
        runs.sort(
            key=lambda run: (run.data.tags.get("git_commit") == experiment.git_commit, run.info.start_time)
        )
        return str(runs[-1].info.run_id) if runs else None

    def log_run(self, experiment: Experiment) -> str:
        """A run made from the files, for a result that was restored: no run on this server trained these bytes."""
        from mlflow.entities import RunTag

        tags = {
            "mlflow.runName": experiment.tag,
            "restored_from": "files",
            "git_commit": experiment.git_commit,
        }
        within = experiment_id(self.client, self.uri, self.settings.mlflow_experiment_name)
        run_id = str(self.client.create_run(within, tags=tags).info.run_id)
        self.complete_run(run_id, experiment)
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in facts(experiment).items()])
        self.client.set_terminated(run_id)
        return run_id

    def complete_run(self, run_id: str, experiment: Experiment) -> None:
        """Log the params and test metrics that the run lacks; what it has is left as it is."""
        from mlflow.entities import Metric, Param

        data, now = self.client.get_run(run_id).data, int(time.time() * 1000)
        params = [
            Param(key, value) for key, value in texts(experiment.params).items() if key not in data.params
        ]
        metrics = [
            Metric(key, value, now, 0)
            for key, value in numbers(experiment.metrics).items()
            if key not in data.metrics
        ]
        for start in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[start : start + 100])
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)


def manifest(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path, but of the manifest itself."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: files.sha256(path) for name, path in names.items() if name != MANIFEST}


def write_manifest(folder: Path) -> str:
    """Its own sha256."""
    files.write_json(folder / MANIFEST, manifest(folder))
    return files.sha256(folder / MANIFEST)


def facts(experiment: Experiment) -> dict[str, str]:
    """What leads from a model to its code, data, params and results, as tags."""
    return {
        "git_commit": experiment.git_commit,
        "data_hash": experiment.data_hash,
        "lock_sha256": experiment.lock_sha256,
        "model_sha256": experiment.model.sha256,
        "model_tag": experiment.tag,
        "params": json.dumps(experiment.params, sort_keys=True),
        "metrics": json.dumps(experiment.metrics, sort_keys=True),
    }


def agrees(run: Any, experiment: Experiment) -> bool:
    """Whether nothing that the run has logged contradicts the experiment."""
    params, metrics = texts(experiment.params), numbers(experiment.metrics)
    return all(run.data.params.get(key, value) == value for key, value in params.items()) and all(
        run.data.metrics.get(key, value) == value for key, value in metrics.items()
    )


def texts(params: dict[str, Any]) -> dict[str, str]:
    """Params as a run has them: dotted keys, values as text."""
    return {key: str(value) for key, value in flat(params).items()}


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """{"accuracy": {"mean": 0.9, "low": 0.8}} to {"accuracy": 0.9, "accuracy_low": 0.8}; what is no number is left out."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        parts = value if isinstance(value, dict) else {"mean": value}
        for part, number in parts.items():
            if isinstance(number, int | float) and not isinstance(number, bool):
                found[name if part == "mean" else f"{name}_{part}"] = float(number)
    return found
