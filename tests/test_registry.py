"""The registry against a real MLflow server: registering, promoting, the audit trail, and what is refused."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import chdir
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import requests

import ml.tracking.model
from benchmarks.registry import FORGERIES, Case
from ml import files, promote
from ml.errors import UserError
from ml.settings import Settings
from ml.tracking import registry
from ml.tracking.lifecycle import State
from ml.tracking.store import Registry, texts
from tests import released
from tests.experiment import Experiment
from tests.lost_answers import answers_lost
from tests.mlflow_server import mlflow_server
from tests.ports import free_port
from tests.released import Releases, fake_flavours, make_releases, settings_for

V1, V2, WORSE = "model-v1.0.0", "model-v1.1.0", "model-v1.2.0"
names = (f"model{number}" for number in count())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with mlflow_server(folder) as address:
        yield address


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    return make_releases(tmp_path_factory.mktemp("releases"))


@pytest.fixture(autouse=True)
def in_the_repository(releases: Releases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ml.tracking.model, "save_model", fake_flavours)
    monkeypatch.chdir(releases.latest)


@pytest.fixture
def settings(server: str) -> Settings:
    """A registered model of its own for each test."""
    return settings_for(server, next(names))


@pytest.fixture
def command(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`python -m ml.promote` in this process; its output. A UserError is raised, not printed."""

    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["ml.promote", *arguments])
        monkeypatch.setattr(promote, "load_settings", lambda: settings)
        capsys.readouterr()
        try:
            promote.main()
        except SystemExit as ended:
            assert ended.code == code
        else:
            assert code == 0
        return capsys.readouterr().out

    return run


def client_of(settings: Settings) -> Any:
    return registry.connect(settings).client


def state_of(settings: Settings) -> State:
    return registry.connect(settings).state()


def versions_of(settings: Settings) -> list[Any]:
    return list(registry.connect(settings).search_versions(""))


def champion(settings: Settings, *tags: str) -> None:
    for tag in tags:
        promote.promote(settings, tag, "staging", "try", None)
        promote.promote(settings, tag, "champion", "go", None)


# ---- Registering


def test_registered_version_carries_the_whole_trace(
    settings: Settings, releases: Releases, server: str
) -> None:
    settings = settings.model_copy(update={"ci_job_url": "https://gitlab.example.com/g/proj/-/jobs/5"})
    version = releases.register(settings, V1, gate="first")
    experiment = json.loads((releases.at[V1] / "models" / V1 / "experiment.json").read_bytes())
    assert version.tags["git_commit"] == experiment["git_commit"]
    assert version.tags["data_hash"] == experiment["data_hash"]
    assert version.tags["lock_sha256"] == files.sha256(releases.at[V1] / "dvc.lock")
    assert version.tags["model_sha256"] == files.sha256(releases.at[V1] / "artifacts" / "model.onnx")
    assert version.tags["model_tag"] == version.tag == V1
    assert json.loads(version.tags["params"]) == experiment["params"]
    assert json.loads(version.tags["metrics"]) == experiment["metrics"]
    assert version.tags["comment_url"] == released.COMMENT
    assert version.tags["gate"] == "first"
    assert version.tags["ci_job_url"].endswith("/jobs/5")
    # What serving asks, by plain REST:
    api = f"{server}/api/2.0/mlflow"
    found = requests.get(
        f"{api}/registered-models/alias", {"name": version.name, "alias": "candidate"}, timeout=10
    )
    assert found.json()["model_version"]["version"] == version.version
    uri = requests.get(
        f"{api}/model-versions/get-download-uri", {"name": version.name, "version": "1"}, timeout=10
    )
    path = uri.json()["artifact_uri"].removeprefix("mlflow-artifacts:/")
    served = requests.get(f"{server}/api/2.0/mlflow-artifacts/artifacts/{path}/bundle/model.onnx", timeout=10)
    assert served.content == (releases.at[V1] / "artifacts" / "model.onnx").read_bytes()


def test_run_that_trained_these_bytes_is_the_versions_run(settings: Settings, releases: Releases) -> None:
    client = client_of(settings)
    experiment = json.loads((releases.at[V1] / "models" / V1 / "experiment.json").read_bytes())
    within = client.create_experiment(settings.mlflow_experiment_name)
    right = client.create_run(within, tags={"model_sha256": experiment["model"]["sha256"]}).info.run_id
    other_params = client.create_run(within, tags={"model_sha256": experiment["model"]["sha256"]}).info.run_id
    unfinished = client.create_run(within, tags={"model_sha256": experiment["model"]["sha256"]}).info.run_id
    client.log_param(right, "train.epochs", texts(experiment["params"])["train.epochs"])
    client.log_param(other_params, "train.epochs", "99")
    for run_id in (right, other_params):
        client.set_terminated(run_id)
    version = releases.register(settings, V1)
    assert version.run_id == right != unfinished
    run = client.get_run(right)
    assert run.data.params == texts(experiment["params"])
    assert run.data.metrics["accuracy"] == experiment["metrics"]["accuracy"]["mean"]


def test_restored_result_gets_a_run_made_from_its_files(settings: Settings, releases: Releases) -> None:
    version = releases.register(settings, V1)
    run = client_of(settings).get_run(version.run_id)
    assert run.data.tags["restored_from"] == "files"
    assert run.data.params and run.data.metrics and run.info.status == "FINISHED"
    assert {"git_commit", "data_hash", "lock_sha256", "model_sha256"} <= run.data.tags.keys()


def test_registering_twice_gives_the_same_version(settings: Settings, releases: Releases) -> None:
    assert releases.register(settings, V1).version == releases.register(settings, V1).version
    assert len(versions_of(settings)) == len(state_of(settings).entries) == 1


@pytest.mark.parametrize(
    "broken",
    ["create_run", "log_artifacts", "create_model_version", "log_param", "set_registered_model_alias"],
)
def test_registration_that_broke_off_is_finished_by_the_next(
    broken: str, settings: Settings, releases: Releases
) -> None:
    told = "(?s)failed while registering model-v1.0.0.*run the same command"
    with answers_lost(broken), pytest.raises(UserError, match=told):
        releases.register(settings, V1)
    version = releases.register(settings, V1)
    assert len(versions_of(settings)) == len(state_of(settings).entries) == 1
    assert registry.connect(settings).aliases() == {"candidate": version.version}
    promote.promote(settings, V1, "staging", "whole", None)


def test_two_registrations_at_once_make_one_version(settings: Settings, releases: Releases) -> None:
    found, errors = in_parallel(4, lambda number: releases.register(settings, WORSE).version)
    assert not errors and len(set(found)) == 1
    assert len(versions_of(settings)) == len(state_of(settings).entries) == 1


def test_release_tag_never_changes_its_model(settings: Settings, releases: Releases, tmp_path: Path) -> None:
    releases.register(settings, V1)
    shutil.copytree(releases.at[V2], tmp_path / "repo")
    with chdir(tmp_path / "repo"):
        from ml import bundle

        folder = bundle.write_bundle(Path("models"), V1)
        with pytest.raises(UserError, match="in the registry with another model .version 1.*under a new tag"):
            registry.register(settings, folder, comment_url=None, gate="passed")


def test_results_of_another_commit_are_refused(settings: Settings, releases: Releases) -> None:
    with pytest.raises(UserError, match="artifacts/model.onnx is missing or is not that of model-v1.0.0"):
        registry.register(settings, releases.at[V1] / "models" / V1, comment_url=None, gate="passed")


def test_torn_bundle_and_unknown_gate_are_refused(
    settings: Settings, releases: Releases, tmp_path: Path
) -> None:
    shutil.copytree(releases.latest / "models" / WORSE, tmp_path / WORSE)
    (tmp_path / WORSE / "golden.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match="golden.npz is missing, or is not the file"):
        registry.register(settings, tmp_path / WORSE, comment_url=None, gate="passed")
    with pytest.raises(UserError, match="gate is 'maybe'; it can be: passed"):
        registry.register(settings, tmp_path / WORSE, comment_url=None, gate="maybe")


def test_server_that_is_down_is_named_without_its_password(releases: Releases) -> None:
    settings = settings_for(f"http://ada:secret@127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="MLflow at http://127.0.0.1:.* failed while registering") as caught:
        releases.register(settings, V1)
    assert "secret" not in str(caught.value)


# ---- Promoting


def test_life_cycle_from_experimental_to_archived(
    settings: Settings, releases: Releases, command: Any
) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    assert command(V1, "--to", "staging", "--why", "looks good") == f"1 ({V1}): candidate → staging\n"
    command("promote", "1", "--to", "challenger", "--why", "A/B test")
    assert registry.connect(settings).aliases() == {"challenger": "1", "candidate": "2"}
    command("challenger", "--to", "champion", "--why", "won")
    command("2", "--to", "staging", "--why", "better")
    moved = command("staging", "--to", "champion", "--why", "even better")
    assert moved == f"1 ({V1}): champion → archived\n2 ({V2}): staging → champion\n"
    assert registry.connect(settings).aliases() == {"champion": "2", "archived": "1"}
    assert command("rollback", "--why", "it drifts").endswith(f"1 ({V1}): archived → champion\n")
    assert registry.connect(settings).aliases() == {"champion": "1", "archived": "2"}
    history = command("history", V1).splitlines()
    assert [line.split("  ")[2] for line in history] == [
        "(new) → candidate",
        "candidate → staging",
        "staging → challenger",
        "challenger → champion",
        "champion → archived",
        "archived → champion",
    ]
    assert "rollback by Ada <ada@example.com>: it drifts" in history[-1]
    tags = client_of(settings).get_model_version(settings.mlflow_model_name, "1").tags
    assert tags["stage"] == "champion"
    assert [tags[key] for key in sorted(tags) if key.startswith("trail.")] == history


def test_demotion_leaves_production_empty_and_says_who(
    settings: Settings, releases: Releases, command: Any
) -> None:
    releases.register(settings, V1)
    champion(settings, V1)
    assert command("demote", "champion", "--why", "recalled") == f"1 ({V1}): champion → archived\n"
    assert "champion" not in registry.connect(settings).aliases()
    assert "champion   –" in command("status")
    assert "demote by Ada <ada@example.com>: recalled" in command("history", "1")


def test_job_and_person_of_a_pipeline_are_in_the_trail(settings: Settings, releases: Releases) -> None:
    job = "https://gitlab.example.com/g/proj/-/jobs/7"
    settings = settings.model_copy(update={"gitlab_user_login": "bob", "ci_job_url": job})
    releases.register(settings, V1)
    assert state_of(settings).entries[0].who == f"bob in {job}"


def test_worse_model_needs_a_reason_that_is_kept(
    settings: Settings, releases: Releases, command: Any
) -> None:
    for tag in (V1, WORSE):
        releases.register(settings, tag)
    champion(settings, V1)
    with pytest.raises(
        UserError, match="(?s)does not pass the gate: its accuracy is 0.8.*the champion's 0.9.*worse, beyond"
    ):
        command(WORSE, "--to", "staging", "--why", "w")
    assert len(state_of(settings).entries) == 4
    command(WORSE, "--to", "staging", "--why", "w", "--accept-regression", "half the size")
    assert "regression accepted: half the size" in command("history", WORSE)


def test_better_model_keeps_no_acceptance(settings: Settings, releases: Releases, command: Any) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    champion(settings, V1)
    command(V2, "--to", "staging", "--why", "w", "--accept-regression", "not needed")
    assert "not needed" not in command("history")


def test_champion_of_other_data_is_not_compared(settings: Settings, releases: Releases, command: Any) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    champion(settings, V1)
    client_of(settings).set_model_version_tag(settings.mlflow_model_name, "1", "data_hash", "0" * 32)
    with pytest.raises(UserError, match="its data is other than the champion's"):
        command(V2, "--to", "staging", "--why", "w")


def test_release_without_a_comment_is_registered_but_not_promoted(
    settings: Settings, releases: Releases
) -> None:
    releases.register(settings, V1, comment_url=None, merge_request_url=None)
    with pytest.raises(
        UserError, match="no complete trace:\n  comment: the version has no tag comment_url\nNothing was"
    ):
        promote.promote(settings, V1, "staging", "w", None)


def test_rollback_to_a_model_whose_files_are_gone_is_refused(
    settings: Settings, releases: Releases, folder: Path
) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    champion(settings, V1, V2)
    (model,) = folder.glob(f"artifacts/*/{first_run(settings)}/artifacts/registered/{V1}/bundle/model.onnx")
    model.unlink()
    with pytest.raises(UserError, match="no complete trace(.|\n)*bundle/model.onnx is missing"):
        promote.rollback(settings, None, "oops")
    assert state_of(settings).holder("champion") == "2"


def first_run(settings: Settings) -> str:
    return registry.connect(settings).version("1").run_id


def in_parallel(threads: int, work: Callable[[int], Any]) -> tuple[list[Any], list[str]]:
    results: list[Any] = []
    errors: list[str] = []

    def run(number: int) -> None:
        try:
            results.append(work(number))
        except UserError as error:
            errors.append(str(error))

    started = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return results, errors


def test_promotions_at_once_lose_no_entry_and_leave_one_champion(
    settings: Settings, releases: Releases
) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    champion(settings, V1)
    promote.promote(settings, V2, "staging", "w", None)

    def change(number: int) -> Any:
        if number % 2:
            return promote.promote(settings, V2, "champion", f"try {number}", None)
        return promote.rollback(settings, V1, f"back {number}")

    done, refused = in_parallel(6, change)
    state = state_of(settings)
    assert done and len(state.entries) == 5 + len(done)
    assert {entry.number for entry in done} == set(range(6, 6 + len(done)))
    assert len(done) + len(refused) == 6
    assert list(state.stages.values()).count("champion") == 1
    assert registry.connect(settings).aliases() == state.aliases


def test_entry_whose_answer_was_lost_is_written_once(
    settings: Settings, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sends it again, and the server says that it is there already."""
    from mlflow.exceptions import MlflowException

    releases.register(settings, V1)
    real = Registry.write

    def twice(self: Registry, run_id: str, key: str, value: str) -> None:
        real(self, run_id, key, value)
        raise MlflowException("Changing param values is not allowed")

    monkeypatch.setattr(Registry, "write", twice)
    promote.promote(settings, V1, "staging", "w", None)
    assert len(state_of(settings).entries) == 2


def test_alias_moved_by_hand_is_told_and_put_back(
    settings: Settings, releases: Releases, command: Any
) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    champion(settings, V1)
    client_of(settings).set_registered_model_alias(settings.mlflow_model_name, "champion", "2")
    assert "ALIAS MOVED BY HAND: champion points to 2, the trail says 1" in command("status", code=1)
    command("settle")
    assert registry.connect(settings).aliases()["champion"] == "1"
    assert "BY HAND" not in command("status")


def test_change_that_broke_off_before_the_aliases_is_finished_by_the_next(
    settings: Settings, releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in (V1, V2):
        releases.register(settings, tag)
    with monkeypatch.context() as patched:
        patched.setattr(
            Registry, "show", lambda self, state: (_ for _ in ()).throw(ConnectionError("killed"))
        )
        with pytest.raises(UserError):
            promote.promote(settings, V1, "staging", "w", None)
    assert "staging" not in registry.connect(settings).aliases()
    promote.demote(settings, V2, None, "w")
    assert registry.connect(settings).aliases() == {"staging": "1", "archived": "2"}


# ---- Where it came from


def test_one_command_says_what_made_the_model_in_production(
    settings: Settings, releases: Releases, command: Any
) -> None:
    version = releases.register(settings, V2)
    champion(settings, V2)
    told = command("trace", "champion")
    for fact in ("git_commit", "data_hash", "lock_sha256", "model_tag", "comment_url", "merge_request_url"):
        assert version.tags[fact] in told
    assert f"python -m ml.release.reproduce {version.tags['git_commit']}" in told
    assert "train.epochs: 8" in told and "accuracy.mean: 0.9" in told
    assert "staging → champion  promote by Ada <ada@example.com>: go" in told
    assert "The trace is complete" in told
    parsed = json.loads(command("trace", "champion", "--json"))
    assert parsed["params"] == json.loads(version.tags["params"])
    assert parsed["problems"] == {} and parsed["misplaced"] == []


def test_trace_of_a_tampered_champion_says_so_and_exits_1(
    settings: Settings, releases: Releases, command: Any
) -> None:
    releases.register(settings, V2)
    champion(settings, V2)
    client_of(settings).set_model_version_tag(settings.mlflow_model_name, "1", "data_hash", "0" * 32)
    told = command("trace", "champion", code=1)
    assert "NOT TRUE OR MISSING: data: data_hash is 00000000" in told
    assert "The trace is complete" not in told
    assert command("check", "champion", code=1).count("ok\n") == 12


def test_origin_of_a_run_is_what_it_was_made_from(settings: Settings, releases: Releases) -> None:
    version = releases.register(settings, V1)
    origin = registry.origin_of_run(settings, version.run_id)
    assert origin.git_commit == version.tags["git_commit"]
    assert origin.data_hash == version.tags["data_hash"]
    assert origin.lock_sha256 == version.tags["lock_sha256"]
    assert origin.model_sha256 == version.tags["model_sha256"]


def test_run_without_a_commit_or_none_at_all_cannot_be_made_again(settings: Settings) -> None:
    client = client_of(settings)
    run_id = client.create_run(client.create_experiment(settings.mlflow_experiment_name)).info.run_id
    with pytest.raises(UserError, match="does not say which commit it was made from .git_commit: missing"):
        registry.origin_of_run(settings, run_id)
    for unknown in ("0" * 32, "not a run"):
        with pytest.raises(UserError, match="There is no run"):
            registry.origin_of_run(settings, unknown)


def test_best_run_comes_with_the_command_that_makes_it_again(
    settings: Settings, releases: Releases, command: Any
) -> None:
    runs = {tag: releases.register(settings, tag).run_id for tag in (V1, V2, WORSE)}
    lines = command("best", "--count", "2").splitlines()
    assert runs[V2] in lines[0] and runs[V1] in lines[1]
    assert lines[2] == f"Make the best again: python -m ml.release.reproduce {runs[V2]}"
    assert (
        runs[V2] in command("best", "--metric", "loss").splitlines()[2]
    )  # the fixture's loss is its accuracy
    with pytest.raises(UserError, match="has a metric 'f1'"):
        command("best", "--metric", "f1")


def test_registry_with_nothing_in_it_says_so(settings: Settings, command: Any) -> None:
    assert command("status").count("–") == 5
    assert command("history") == ""
    with pytest.raises(UserError, match="'champion' is no version.*versions: none"):
        command("trace", "champion")


# ---- One piece removed or forged

BEHIND = [
    name
    for name in FORGERIES
    if not name.startswith(("run", "version", "git tag", "another model everywhere"))
]


@pytest.fixture(scope="module")
def registered(server: str, releases: Releases, folder: Path) -> Iterator[tuple[Settings, Any, Path]]:
    """A whole version, before and after: it is each forgery that is refused, and nothing else."""
    settings = settings_for(server, "forged")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ml.tracking.model, "save_model", fake_flavours)
        version = releases.register(settings, WORSE)
    (place,) = folder.glob(f"artifacts/*/{version.run_id}/artifacts/registered/{WORSE}")
    for end in (False, True):
        with chdir(releases.latest), registry.reaching(settings, "checking") as reg:
            found = promote.findings(reg, reg.version(version.version), reg.state(), settings)
        assert len(found) == 13 and not [each.problem for each in found if each.problem]
        if not end:
            yield settings, version, place


@pytest.mark.parametrize("name", BEHIND[::2])  # `python -m benchmarks.registry` tries them all
def test_forged_version_is_refused(
    name: str, registered: tuple[Settings, Any, Path], releases: Releases, tmp_path: Path
) -> None:
    settings, version, place = registered
    case = Case(settings, version, place, Experiment(releases.latest))
    before = case.client.get_model_version(version.name, version.version).tags
    shutil.copytree(place, tmp_path / "before")
    try:
        FORGERIES[name](case)
        with pytest.raises(UserError, match="has no complete trace"):
            promote.promote(settings, version.version, "staging", "forged", None)
    finally:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "before", place)
        for key in before:
            case.tag(key, before[key])
    assert state_of(settings).holder("candidate") == version.version


@pytest.mark.parametrize("name", [name for name in FORGERIES if name not in BEHIND])
def test_version_with_another_run_or_git_tag_is_refused(
    name: str,
    settings: Settings,
    releases: Releases,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    version = releases.register(settings, WORSE)
    shutil.copytree(releases.latest, tmp_path / "repo")
    monkeypatch.chdir(tmp_path / "repo")
    (place,) = folder.glob(f"artifacts/*/{version.run_id}/artifacts/registered/{WORSE}")
    case = Case(settings, version, place, Experiment(tmp_path / "repo"))
    FORGERIES[name](case)
    with pytest.raises(UserError):
        promote.promote(settings, case.version.version, "staging", "forged", None)
    assert len(state_of(settings).entries) == 1


def test_reading_writes_nothing(settings: Settings, command: Any) -> None:
    command("status")
    command("history")
    found = [each.name for each in client_of(settings).search_experiments()]
    assert not [name for name in found if name.startswith(settings.mlflow_model_name + "-")]
