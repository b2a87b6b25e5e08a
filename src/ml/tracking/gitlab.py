"""GitLab as MLflow server: MLFLOW_TRACKING_URI=$CI_API_V4_URL/projects/$CI_PROJECT_ID/ml/mlflow.

What its API lacks is done another way (read in GitLab's source: lib/api/ml/mlflow, app/models/ml):

| MLflow | GitLab | here |
|---|---|---|
| versions 1, 2, 3 | semantic versions, chosen by tag gitlab.version; `version` in answers is a row's id | named by the semantic version; `uri` has the id, since models:/NAME/1.2.3 quietly loads the latest |
| log_model | no logged models | files are logged to the version's own run |
| tags of a version | only when it is created; 5,000 characters | all at once; what comes later is a tag of its run |
| tags of a run | written once: a second time is an error | that is what makes the trail safe here |
| aliases, search_model_versions, delete | none | stages come from the trail; descriptions show them to people |
| search_runs | one experiment; filters are ignored | filtered here |
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

from ml import files
from ml.errors import UserError
from ml.tracking.lifecycle import STAGES, State
from ml.tracking.store import ENTRY, Registry, Version, write_manifest

ADDRESS = re.compile(r"https?://[^\s]+/api/v4/projects/[^/]+/ml/mlflow/?")
SEMANTIC = re.compile(r"(\d+)\.(\d+)\.(\d+)$")
TAG_LIMIT = 5000  # characters
DESCRIPTION_LIMIT = 10_000
SHOWN = re.compile(r"(?m)^\| (\w+) \| ([^ |]+) \|")
ENTRIES_SHOWN = re.compile(r"(?m)^Entries: (\d+)$")


def is_gitlab(uri: str) -> bool:
    return ADDRESS.fullmatch(uri) is not None


def semantic(tag: str) -> str:
    """model-v1.2.0 → 1.2.0; a tag without such an ending becomes a pre-release of 0.0.0."""
    match = SEMANTIC.search(tag)
    if match:
        return ".".join(str(int(part)) for part in match.groups())
    return f"0.0.0-{re.sub(r'[^0-9A-Za-z-]', '-', tag)}"


class GitLabRegistry(Registry):
    # ---- The trail

    def written(self, run: Any) -> dict[str, str]:
        return {key: value for key, value in run.data.tags.items() if ENTRY.fullmatch(key)}

    def write(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value)

    def aliases(self) -> dict[str, str]:
        description = self.client.get_registered_model(self.name).description or ""
        return {alias: version for alias, version in SHOWN.findall(description) if alias in STAGES}

    def show(self, state: State) -> None:
        """The stages in the model's description, each version's part of the trail in its own."""
        present = self.client.get_registered_model(self.name).description or ""
        shown = ENTRIES_SHOWN.search(present)
        fresh = state.entries[int(shown[1]) if shown else 0 :]
        for version in {move.version for entry in fresh for move in entry.moves}:
            self.client.update_model_version(self.name, version, describe_version(state, version))
        description = describe_model(state)
        if present != description:
            self.client.update_registered_model(self.name, description)

    # ---- Versions

    def version(self, version: str) -> Version:
        found = self._get(version)
        if found is None:
            raise UserError(
                f"Version {version} of {self.name} is in the trail, but not in the registry: somebody deleted it."
            )
        return found

    def _get(self, version: str) -> Version | None:
        from mlflow.exceptions import MlflowException

        try:
            return self._version(self.client.get_model_version(self.name, version))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _version(self, found: Any) -> Version:
        run_tags = self.client.get_run(found.run_id).data.tags
        manifest = {key: run_tags[key] for key in ("manifest_sha256",) if key in run_tags}
        tags = {str(key): str(value) for key, value in found.tags.items()} | manifest
        uri = f"models:/{self.name}/{found.version}"
        return Version(self.name, str(found.aliases[0]), tags.get("run_id", found.run_id), uri, tags)

    def unfinished(self, tag: str) -> Version | None:
        found = self._get(semantic(tag))
        if found is not None and found.tag != tag:
            raise UserError(
                f"Version {found.version} of {self.name} is {found.tag or 'not of this template'}, so {tag} cannot be it, too."
            )
        return found if found is not None and "manifest_sha256" in found.tags else None

    def create_model(self) -> None:
        from mlflow.exceptions import MlflowException

        super().create_model()
        try:
            self.client.get_registered_model(self.name)
        except MlflowException as error:  # GitLab says "already exists" to a name that it does not take, too
            raise UserError(
                f"GitLab does not take {self.name!r} as the name of a model ({error.error_code}). Set "
                "MLFLOW_MODEL_NAME to letters, digits, '.', '_' and '-'."
            ) from None

    def add_version(
        self, tag: str, run_id: str, tags: dict[str, str], write: Callable[[Path], None]
    ) -> Version:
        """The version comes first, for its files need its run; one without all its files has no manifest yet."""
        from mlflow.entities import RunTag

        long = [key for key, value in tags.items() if len(value) > TAG_LIMIT]
        if long:
            raise UserError(
                f"GitLab takes tags of {TAG_LIMIT:,} characters at most; {', '.join(long)} of {tag} has more."
            )
        number = semantic(tag)
        if self._get(number) is None:
            self.client.create_model_version(
                self.name, "", tags=tags | {"gitlab.version": number}, await_creation_for=0
            )
        own_run = self.client.get_model_version(self.name, number).run_id
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            manifest = write_manifest(Path(folder))
            self.client.log_artifacts(own_run, folder, "")
        self._copy_run(run_id, own_run)
        done = [RunTag("manifest_sha256", manifest)]
        here = self.settings.api_url is not None and self.uri.startswith(f"{self.settings.api_url}/")
        if here and self.settings.ci_job_id is not None:  # a job that GitLab does not know is an error 500
            done.append(RunTag("gitlab.CI_JOB_ID", str(self.settings.ci_job_id)))
        self.client.log_batch(own_run, tags=done)
        return self.version(number)

    def _copy_run(self, source: str, target: str) -> None:
        """Params and last metrics of the training's run to the version's, where GitLab's pages show them."""
        from mlflow.entities import Metric, Param

        run, present = self.client.get_run(source), self.client.get_run(target).data
        params = [Param(key, value) for key, value in run.data.params.items() if key not in present.params]
        metrics = [
            Metric(key, value, run.info.start_time, 0)
            for key, value in run.data.metrics.items()
            if key not in present.metrics
        ]
        self.client.log_batch(target, params=params, metrics=metrics)

    def remove_version(self, version: Version) -> None:
        raise UserError(
            f"GitLab's API cannot delete version {version.version} of {self.name}. Do it on its page."
        )

    def download(self, version: Version, folder: Path) -> Path:
        base = self.uri.rstrip("/")
        number = version.uri.rpartition("/")[2]
        listed = fetch(f"{base}/api/2.0/mlflow-artifacts/artifacts?path={number}").json()["files"]
        for name in (unquote(each["path"]) for each in listed):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"Version {version.version} of {self.name} has a file with an unsafe name: {name!r}."
                )
            address = f"{base.removesuffix('/ml/mlflow')}/packages/ml_models/{number}/files/{quote(name)}"
            files.write_bytes(folder / path, fetch(address).content)
        return folder

    # ---- Runs

    def search_runs(self, experiments: list[str], filter: str = "", **options: Any) -> Iterator[Any]:
        return super().search_runs(experiments)  # GitLab has no filters: whoever calls this looks again

    def best_runs(self, metric: str, highest: bool) -> Iterator[Any]:
        runs = [run for run in self.training_runs() if metric in run.data.metrics]
        return iter(sorted(runs, key=lambda run: float(run.data.metrics[metric]), reverse=highest))


def describe_model(state: State) -> str:
    """What people read on the model's page, and what serving finds the champion in."""
    rows = [f"| {stage} | {version} | {state.tags[version]} |" for stage, version in state.aliases.items()]
    lines = ["Stages, made from the trail by `python -m ml.promote`:", "", "| stage | version | release |"]
    return "\n".join([*lines, "|---|---|---|", *rows, "", f"Entries: {len(state.entries)}"])


def describe_version(state: State, version: str) -> str:
    """Its stage and history, the newest first, within GitLab's limit. In a code block: who and why are people's text."""
    lines = [
        entry.describe(move).replace("\n", " ").replace("`", "'")
        for entry in reversed(state.entries)
        for move in entry.moves
        if move.version == version
    ]
    text = f"Stage: {state.stages[version]}\n\n```\n" + "\n".join(lines)
    return text[: DESCRIPTION_LIMIT - 4] + "\n```"


def fetch(address: str) -> Any:
    import requests

    headers = {"Authorization": f"Bearer {os.environ.get('MLFLOW_TRACKING_TOKEN', '')}"}
    trusted = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True  # as MLflow's own requests
    answer = requests.get(address, headers=headers, timeout=60, verify=trusted)
    answer.raise_for_status()
    return answer
