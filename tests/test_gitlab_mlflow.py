"""GitLab's MLflow-compatible API as tracking server and registry, by the real mlflow client against an emulation.

The first part holds the emulation to what GitLab does (tests/gitlab_emulator/mlflow.py cites the source), the second the
registry to work within that.
"""

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

import ml.tracking.model
from ml import files, promote
from ml.errors import UserError
from ml.settings import Settings
from ml.tracking import gitlab, registry
from ml.tracking.trace import NOTE, exists
from tests import released
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.mlflow import Registry, registry_of
from tests.lost_answers import answers_lost
from tests.released import Releases, fake_flavours, make_releases, settings_for

V1, V2 = "model-v1.0.0", "model-v1.1.0"
names = (f"model{number}" for number in count())


@pytest.fixture(scope="module")
def server() -> Iterator[GitLabEmulator]:
    with GitLabEmulator() as emulator:
        yield emulator


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    return make_releases(tmp_path_factory.mktemp("releases"))


@pytest.fixture
def uri(server: GitLabEmulator, releases: Releases, monkeypatch: pytest.MonkeyPatch) -> str:
    server.reset()
    token = server.state.add_token(server.project, "api", access_level=30).value
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(ml.tracking.model, "save_model", fake_flavours)
    monkeypatch.chdir(releases.latest)
    return f"{server.url}/api/v4/projects/{server.project.id}/ml/mlflow"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def settings(uri: str) -> Settings:
    return settings_for(uri, next(names))


def known(server: GitLabEmulator) -> Registry:
    return registry_of(server.project)


# ---- The emulation is as GitLab is


def test_run_keeps_params_metrics_and_tags(client: MlflowClient) -> None:
    experiment = client.create_experiment("runs")
    run_id = client.create_run(experiment, run_name="one").info.run_id
    client.log_batch(run_id, [Metric("loss", 0.5, 1, 1), Metric("loss", 0.25, 2, 2)], [Param("epochs", "3")])
    client.set_tag(run_id, "git_commit", "abc")
    client.set_terminated(run_id)
    run = client.get_run(run_id)
    assert (run.data.params, run.data.metrics, run.data.tags["git_commit"]) == (
        {"epochs": "3"},
        {"loss": 0.25},
        "abc",
    )
    assert (run.info.status, run.info.run_name) == ("FINISHED", "one")
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [0.5, 0.25]


def test_tag_and_param_of_a_run_are_written_once(client: MlflowClient) -> None:
    run_id = client.create_run(client.create_experiment("runs")).info.run_id
    client.set_tag(run_id, "key", "one")
    client.log_param(run_id, "epochs", "1")
    with pytest.raises(MlflowException, match="already taken"):
        client.set_tag(run_id, "key", "two")
    with pytest.raises(MlflowException, match="already taken"):
        client.log_param(run_id, "epochs", "2")
    client.log_batch(run_id, tags=[RunTag("key", "three")])  # passed over without a word
    assert client.get_run(run_id).data.tags["key"] == "one"


def test_version_is_asked_for_by_number_and_answers_with_an_id(client: MlflowClient) -> None:
    client.create_registered_model("m")
    made = client.create_model_version("m", "", tags={"gitlab.version": "1.2.3"})
    found = client.get_model_version("m", "1.2.3")
    assert found.version == made.version == "100"
    assert found.aliases == ["1.2.3"]
    with pytest.raises(MlflowException, match="RESOURCE_DOES_NOT_EXIST"):
        client.get_model_version("m", found.version)
    with pytest.raises(MlflowException, match="semantic version"):
        client.create_model_version("m", "", tags={"gitlab.version": "v1"})
    with pytest.raises(MlflowException, match="already been taken"):
        client.create_model_version("m", "", tags={"gitlab.version": "1.2.3"})


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.set_registered_model_alias("m", "champion", "100"),
        lambda client: client.set_model_version_tag("m", "1.0.0", "key", "value"),
        lambda client: client.search_model_versions("name='m'"),
        lambda client: client.delete_model_version("m", "1.0.0"),
        lambda client: client.search_logged_models(["1"]),
    ],
)
def test_what_gitlab_lacks_is_lacking(call: Any, client: MlflowClient) -> None:
    client.create_registered_model("m")
    client.create_model_version("m", "", tags={"gitlab.version": "1.0.0"})
    with pytest.raises(MlflowException, match="404|405"):
        call(client)


def test_searching_runs_ignores_filters_and_takes_no_order(client: MlflowClient) -> None:
    experiment = client.create_experiment("runs")
    runs = [client.create_run(experiment).info.run_id for _ in range(3)]
    page = client.search_runs([experiment], "tags.key = 'no run has it'", max_results=2)
    assert [run.info.run_id for run in page] == runs[:0:-1]
    assert [run.info.run_id for run in client.search_runs([experiment], page_token=page.token)] == runs[:1]
    with pytest.raises(MlflowException, match="order_by is invalid"):
        client.search_runs([experiment], order_by=["metrics.loss ASC"])


def test_reporter_cannot_write_and_a_job_token_is_not_taken(
    server: GitLabEmulator, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in (server.token, server.job_token):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        with pytest.raises(MlflowException, match="401"):
            client.create_experiment("runs")


# ---- The registry works within that


@pytest.mark.parametrize(
    ("uri", "is_one"),
    [
        ("https://gitlab.com/api/v4/projects/7/ml/mlflow", True),
        ("https://git.example.com/gitlab/api/v4/projects/g%2Fproj/ml/mlflow/", True),
        ("https://mlflow.example.com", False),
        ("sqlite:///mlflow.db", False),
    ],
)
def test_gitlab_is_told_by_its_address(uri: str, is_one: bool) -> None:
    assert gitlab.is_gitlab(uri) is is_one


def test_release_tag_becomes_a_semantic_version() -> None:
    assert gitlab.semantic("model-v1.2.10") == "1.2.10"
    assert gitlab.semantic("run-0a1b2c3d") == "0.0.0-run-0a1b2c3d"
    assert gitlab.semantic("model-v01.2.0") == "1.2.0"


def test_registered_version_has_its_trace_and_its_files(
    settings: Settings, releases: Releases, client: MlflowClient, server: GitLabEmulator
) -> None:
    version = releases.register(settings, V1)
    assert (version.version, version.tag) == ("1.0.0", V1)
    found = client.get_model_version(settings.mlflow_model_name, "1.0.0")
    for key in (
        "git_commit",
        "data_hash",
        "lock_sha256",
        "model_sha256",
        "params",
        "metrics",
        "comment_url",
        "gate",
    ):
        assert found.tags[key] == version.tags[key] != ""
    assert set(known(server).files_of(found.version)) >= {
        "MLmodel",
        "bundle%2Fmodel.onnx",
        "trace%2Fmanifest.json",
    }
    own_run = client.get_run(found.run_id)
    assert own_run.data.params["train.epochs"] == "7"
    assert own_run.data.metrics["accuracy"] == pytest.approx(0.9, abs=0.05)


def test_version_is_loaded_by_its_uri_and_never_by_its_number(
    settings: Settings, releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models:/m/1.0.0` is taken for a stage by MLflow's client, and GitLab answers with the latest version."""
    first, second = releases.register(settings, V1), releases.register(settings, V2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_tracking_uri)
    trap = f"models:/{settings.mlflow_model_name}/1.0.0"
    hashes = {}
    for uri in (first.uri, second.uri, trap):
        place = download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / str(len(hashes))))
        hashes[uri] = files.sha256(
            next(path for path in Path(place).rglob("*") if path.name.endswith("model.onnx"))
        )
    assert hashes[first.uri] == first.tags["model_sha256"]
    assert hashes[second.uri] == hashes[trap] == second.tags["model_sha256"]


def test_registering_twice_gives_the_same_version(
    settings: Settings, releases: Releases, server: GitLabEmulator
) -> None:
    assert releases.register(settings, V1) == releases.register(settings, V1)
    assert len(known(server).models[settings.mlflow_model_name].versions) == 1


@pytest.mark.parametrize(
    "broken", ["create_model_version", "log_artifacts", "log_batch", "set_tag", "update_registered_model"]
)
def test_registration_that_broke_off_is_finished_by_the_next(
    broken: str, settings: Settings, releases: Releases
) -> None:
    with answers_lost(broken), pytest.raises(UserError, match="failed while registering"):
        releases.register(settings, V1)
    releases.register(settings, V1)
    promote.promote(settings, V1, "staging", "whole", None)


def test_life_cycle_without_aliases(
    settings: Settings, releases: Releases, server: GitLabEmulator, capsys: pytest.CaptureFixture[str]
) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
        promote.promote(settings, tag, "staging", "try `it` /approve", None)
        promote.promote(settings, tag, "champion", "go", None)
    promote.rollback(settings, None, "it drifts")
    connected = registry.connect(settings)
    assert connected.aliases() == connected.state().aliases == {"champion": "1.0.0", "archived": "1.1.0"}
    assert promote.trace(settings, "champion", as_json=False)
    assert "archived → champion  rollback by Ada <ada@example.com>: it drifts" in capsys.readouterr().out
    model = known(server).models[settings.mlflow_model_name]
    assert f"| champion | 1.0.0 | {V1} |" in model.description
    assert model.versions[0].description.startswith("Stage: champion\n\n```\n")
    assert "rollback by Ada" in model.versions[0].description
    assert model.versions[0].description.count("`") == 6  # the fence alone: nobody's text gets out of it


def test_description_edited_by_hand_is_put_back(
    settings: Settings, releases: Releases, client: MlflowClient
) -> None:
    releases.register(settings, V1)
    client.update_registered_model(settings.mlflow_model_name, "our model")
    connected = registry.connect(settings)
    assert connected.aliases() == {}
    connected.settle()
    assert connected.aliases() == {"candidate": "1.0.0"}


def test_version_of_changed_files_is_refused(
    settings: Settings, releases: Releases, server: GitLabEmulator
) -> None:
    version = releases.register(settings, V1)
    stored = known(server).files_of(version.uri.rpartition("/")[2])
    for name in ("bundle%2Fmodel.onnx", "MLmodel", "trace%2Fmetrics.json"):
        kept = stored[name]
        stored[name] = kept + b" "
        with pytest.raises(UserError, match="no complete trace"):
            promote.promote(settings, V1, "staging", "w", None)
        stored[name] = kept
    promote.promote(settings, V1, "staging", "w", None)


def test_promotions_at_once_lose_no_entry(settings: Settings, releases: Releases) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    done = []

    def change(tag: str) -> None:
        done.append(promote.promote(settings, tag, "staging", f"{tag} at once", None))

    threads = [threading.Thread(target=change, args=(tag,)) for tag in (V1, V2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = registry.connect(settings).state()
    assert [entry.number for entry in state.entries] == [1, 2, 3, 4]
    assert {entry.why for entry in done} == {f"{V1} at once", f"{V2} at once"}
    assert sorted(state.stages.values()) == ["candidate", "staging"]
    assert registry.connect(settings).aliases() == state.aliases


def test_training_run_is_found_and_its_origin_known(
    settings: Settings, releases: Releases, client: MlflowClient
) -> None:
    version = releases.register(settings, V1)
    other = settings.model_copy(update={"mlflow_model_name": next(names)})
    assert (
        releases.register(other, V1).run_id == version.run_id
    )  # found by its bytes, though GitLab has no filter
    origin = registry.origin_of_run(settings, version.run_id)
    assert origin.git_commit == version.tags["git_commit"]
    releases.register(settings, V2)
    best = registry.best_runs(settings, "accuracy", highest=True, count=1)
    assert best[0].info.run_id == registry.connect(settings).version("1.1.0").run_id


def test_version_is_linked_to_its_job(settings: Settings, releases: Releases, server: GitLabEmulator) -> None:
    known(server).builds.add("5")
    settings = settings.model_copy(update={"ci_job_id": 5, "ci_api_v4_url": f"{server.url}/api/v4"})
    releases.register(settings, V1)
    assert known(server).models[settings.mlflow_model_name].versions[0].run.tags["gitlab.CI_JOB_ID"] == "5"


def test_same_number_of_another_release_is_refused(
    settings: Settings, client: MlflowClient, releases: Releases
) -> None:
    client.create_registered_model(settings.mlflow_model_name)
    client.create_model_version(settings.mlflow_model_name, "", tags={"gitlab.version": "1.0.0"})
    with pytest.raises(UserError, match="1.0.0 of .* is not of this template, so model-v1.0.0 cannot be it"):
        releases.register(settings, V1)


def test_token_of_too_low_a_role_is_named(
    settings: Settings, releases: Releases, server: GitLabEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", server.token)
    with pytest.raises(
        UserError, match="failed while registering(.|\n)*MLFLOW_TRACKING_URI and its credentials"
    ):
        releases.register(settings, V1)


def test_comment_is_asked_for_at_gitlab(server: GitLabEmulator, uri: str) -> None:
    server.add_merge_request(3, title="Train longer", source_branch="experiment")
    note = server.add_note(3, "the report")
    settings = settings_for(
        "sqlite:///none.db", ci_api_v4_url=f"{server.url}/api/v4", repo_token=server.token
    )
    base = f"{server.url}/{server.project.path}/-/merge_requests"
    asked = {
        f"{base}/3#note_{note.id}": True,
        f"{base}/3": True,
        f"{base}/3#note_{note.id + 999}": False,
        f"{base}/4": False,
        released.COMMENT: None,  # another GitLab: nobody here can say
    }
    for url, expected in asked.items():
        match = NOTE.fullmatch(url)
        assert match is not None
        assert exists(url, match, settings) is expected, url
