"""Runs on a real MLflow server: what a training leaves there; servers that are down, silent, killed, or lose answers."""

import json
import multiprocessing
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ml.errors import UserError
from ml.params import load_params
from ml.settings import Settings
from ml.tracking import client as server_client
from ml.tracking import metadata, runs, search, sender
from ml.tracking.journal import Journal, journals, only_one, tidy
from tests.gitlab_emulator import GitLabEmulator
from tests.lossy_proxy import lossy_proxy
from tests.mlflow_server import mlflow_server
from tests.ports import free_port
from tests.workspace import environment, make_workspace, run_stage

DAY = 86_400_000  # milliseconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


def connect(uri: str) -> Any:
    return server_client.connect(uri)


def only_run(client: Any, experiment: str = "ml") -> Any:
    """The one run of the experiment: a second one would be a run that was doubled."""
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return run


def steps(client: Any, run: Any, metric: str) -> list[int]:
    """Of all points of the curve, doubled ones included."""
    return [point.step for point in client.get_metric_history(run.info.run_id, metric)]


def files_of(client: Any, run: Any, path: str | None = None) -> set[str]:
    listed = client.list_artifacts(run.info.run_id, path)
    found = {each.path for each in listed if not each.is_dir}
    return found.union(*(files_of(client, run, each.path) for each in listed if each.is_dir))


# What a training leaves


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which load and preprocess have run, to be copied."""
    folder = make_workspace(tmp_path_factory.mktemp("prepared") / "work")
    for stage in ("load", "preprocess"):
        done = run_stage(stage, folder)
        assert done.returncode == 0, done.stderr
    return folder


def copy_of(prepared: Path, folder: Path, **train: Any) -> Path:
    """With other params of train, which load and preprocess do not depend on."""
    shutil.copytree(prepared, folder)
    return make_workspace(folder, **train)


@pytest.fixture(scope="module")
def recorded(server: str, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which all four stages have run, as a merge request's job, with that server."""
    folder = copy_of(prepared, tmp_path_factory.mktemp("recorded") / "work")
    job = {
        "CI_PROJECT_URL": "https://gitlab.example/g/p",
        "CI_JOB_ID": "7",
        "CI_PIPELINE_ID": "5",
        "CI_MERGE_REQUEST_IID": "3",
    }
    on = {"TRACKING": "on", "MLFLOW_TRACKING_URI": server, "MLFLOW_EXPERIMENT_NAME": "recorded"}
    for stage in ("train", "evaluate"):
        done = run_stage(stage, folder, **on, **job)
        assert done.returncode == 0 and "lacks" not in done.stderr, done.stderr
    assert (
        flush(folder, on).returncode == 0
    )  # what a busy machine has not sent in the few seconds that a stage waits
    return folder


@pytest.mark.slow
def test_run_has_curves_of_every_seed_and_their_mean_by_global_step(recorded: Path, server: str) -> None:
    client = connect(server)
    run = only_run(client, "recorded")
    assert run.info.status == "FINISHED"
    for metric in ("train_loss_seed_0", "train_loss_seed_1", "train_loss"):
        assert steps(client, run, metric) == [10, 20, 30, 40, 50, 60, 70]
    for metric in ("validation_loss", "validation_accuracy_seed_1"):
        assert steps(client, run, metric) == [35, 70]
    seeds = [
        client.get_metric_history(run.info.run_id, f"train_loss_seed_{seed}")[-1].value for seed in (0, 1)
    ]
    assert run.data.metrics["final_loss"] == pytest.approx(sum(seeds) / 2, rel=1e-4)


@pytest.mark.slow
def test_run_has_params_by_both_names_and_evaluation_in_the_same_run(recorded: Path, server: str) -> None:
    run = only_run(connect(server), "recorded")
    assert run.data.params["train.learning_rate"] == run.data.params["learning_rate"] == "0.005"
    metrics = json.loads((recorded / "reports/metrics.json").read_text())
    assert run.data.metrics["accuracy"] == metrics["accuracy"]["mean"]
    assert run.data.metrics["accuracy_low"] == metrics["accuracy"]["low"]
    assert "accuracy_seed_1" in run.data.metrics


@pytest.mark.slow
def test_run_has_system_metrics_under_mlflows_names(recorded: Path, server: str) -> None:
    metrics = only_run(connect(server), "recorded").data.metrics
    for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"):
        assert f"system/{name}" in metrics
    assert "system/network_receive_megabytes" in metrics


@pytest.mark.slow
def test_run_names_data_code_job_machine_and_hashes(recorded: Path, server: str) -> None:
    run = only_run(connect(server), "recorded")
    tags = run.data.tags
    assert tags["ci_job_url"] == "https://gitlab.example/g/p/-/jobs/7"
    assert tags["merge_request_url"] == "https://gitlab.example/g/p/-/merge_requests/3"
    assert tags["gitlab.CI_JOB_ID"] == "7"
    assert tags["git_commit"] == "unknown"  # the workspace is in no repository
    assert tags["device"] == "cpu" and re.match(r"\d+\.", tags["version.torch"])
    assert re.fullmatch("[0-9a-f]{32}", tags["dvc.out.artifacts/model.onnx"])
    (dataset,) = [each.dataset for each in run.inputs.dataset_inputs]
    assert dataset.name == "digits" and dataset.digest == tags["data_hash"]


@pytest.mark.slow
def test_run_has_plots_reports_and_the_model(recorded: Path, server: str) -> None:
    client = connect(server)
    run = only_run(client, "recorded")
    assert {"plots/training_curves.png", "reports/metrics.json", "params.yaml"} <= files_of(client, run)
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, str(model.status)) == ("model", "READY")
    listed = {each.path for each in client.list_logged_model_artifacts(output.model_id)}
    assert {"MLmodel", "conda.yaml", "requirements.txt", "code", "data"} <= listed


@pytest.mark.slow
def test_essay_filter_finds_the_run(
    recorded: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(mlflow_tracking_uri=server, mlflow_experiment_name="recorded")
    (found,) = search.search(
        settings, "params.learning_rate > 0.001 AND metrics.final_loss < 1.1", "accuracy"
    )
    assert found.info.run_id == only_run(connect(server), "recorded").info.run_id
    assert not search.search(
        settings, "params.learning_rate > 0.005 AND metrics.final_loss < 1.1", "accuracy"
    )
    # MLflow's own search, and so its page, compares numbers only of metrics
    experiment = connect(server).get_experiment_by_name("recorded").experiment_id
    own = "metrics.learning_rate > 0.001 AND metrics.final_loss < 1.1"
    assert len(connect(server).search_runs([experiment], own)) == 1
    search.main(settings, "", "final_loss")
    assert found.info.run_id in capsys.readouterr().out
    search.main(settings.model_copy(update={"mlflow_experiment_name": "none"}), "", "accuracy")
    assert "No run of experiment 'none' fits" in capsys.readouterr().err


@pytest.mark.slow
def test_another_evaluation_is_a_run_of_its_own_with_the_curves(
    recorded: Path, server: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(recorded, tmp_path / "copy")
    on = {"TRACKING": "on", "MLFLOW_TRACKING_URI": server, "MLFLOW_EXPERIMENT_NAME": "again"}
    done = run_stage("evaluate", folder, **on)
    assert done.returncode == 0, done.stderr
    assert flush(folder, on).returncode == 0
    client = connect(server)
    run = only_run(client, "again")
    assert run.data.tags["training"] == "restored" and run.info.status == "FINISHED"
    assert steps(client, run, "train_loss_seed_0") == [10, 20, 30, 40, 50, 60, 70]
    assert run.data.metrics["accuracy"] == only_run(client, "recorded").data.metrics["accuracy"]
    assert len(run.outputs.model_outputs) == 1


# While it trains


@pytest.mark.slow
def test_curve_grows_during_training_and_a_killed_training_goes_on_in_its_run(
    server: str, prepared: Path, tmp_path: Path
) -> None:
    folder = copy_of(prepared, tmp_path / "work", epochs=40, checkpoint_seconds=0.2)
    on = {
        "TRACKING": "on",
        "MLFLOW_TRACKING_URI": server,
        "MLFLOW_EXPERIMENT_NAME": "live",
        "TRAIN_PROCESSES": "1",
    }
    command = [sys.executable, "-m", "ml.stages.train"]
    process = subprocess.Popen(command, cwd=folder, env=environment(**on), stderr=subprocess.DEVNULL)
    client = connect(server)
    seen: set[int] = set()
    while len(seen) < 2 and process.poll() is None:
        found = client.get_experiment_by_name("live")
        for run in client.search_runs([found.experiment_id]) if found else []:
            seen |= {len(steps(client, run, "train_loss_seed_0"))} - {0}
        time.sleep(0.1)
    assert process.poll() is None, "the training was over before two different lengths of the curve were seen"
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,) = journals(folder / ".tracking")
    wait_until(lambda: only_run(client, "live").info.status == "KILLED")

    done = run_stage("train", folder, **on)
    assert done.returncode == 0, done.stderr
    assert flush(folder, on).returncode == 0
    run = only_run(client, "live")
    assert run.info.status == "FINISHED"
    for seed in (0, 1):
        assert steps(client, run, f"train_loss_seed_{seed}") == list(range(10, 1401, 10))
    assert steps(client, run, "train_loss") == list(range(10, 1401, 10))


def test_killed_training_is_told_though_its_lock_goes_after_its_last_word(tmp_path: Path) -> None:
    journal = Journal.create(
        tmp_path, tracking_uri="http://127.0.0.1:9", experiment="dying", name="run", fingerprint=""
    )
    with ExitStack() as dying:
        assert dying.enter_context(only_one(journal.folder / "alive"))
        sender.mark_dead(journal)
        assert journal.status == "RUNNING"
        timer = threading.Timer(0.3, dying.close)
        timer.start()
        sender.mark_dead(journal, patience=20)
        timer.join()
    assert journal.status == "KILLED"


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_training_without_a_server_ends_well_and_flush_sends_it_later(prepared: Path, tmp_path: Path) -> None:
    port = free_port()
    folder = copy_of(prepared, tmp_path / "work", epochs=1, seeds=[0])
    on = {"TRACKING": "on", "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    for stage in ("train", "evaluate"):
        done = run_stage(stage, folder, **on)
        assert done.returncode == 0, done.stderr
    assert "did not record this run whole yet" in done.stderr and "ml.tracking flush" in done.stderr
    assert flush(folder, on).returncode == 1
    with mlflow_server(tmp_path / "server", port) as address:
        sent = flush(folder, on)
        assert sent.returncode == 0 and "1 runs sent, 0 kept" in sent.stderr, sent.stderr
        client = connect(address)
        run = only_run(client)
        assert run.info.status == "FINISHED" and "accuracy" in run.data.metrics
        assert steps(client, run, "train_loss_seed_0") == [10, 20, 30, 35]
        assert "plots/training_curves.png" in files_of(client, run)
        assert json.loads((folder / "reports/run.json").read_text())["run_id"] == run.info.run_id
        assert sender.flush(folder / ".tracking") == (0, [])


def flush(folder: Path, on: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ml.tracking", "flush"]
    return subprocess.run(command, cwd=folder, env=environment(**on), capture_output=True, text=True)


@pytest.mark.slow
def test_silent_server_keeps_a_stage_a_few_seconds_at_most(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and never answers
        settings = Settings(mlflow_tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}", tracking=True)
        with runs.training(load_params(), settings, "f", {}):
            (journal,) = journals(workplace / ".tracking")
            wait_until((journal.folder / "ready").exists)
            started = time.monotonic()
        assert time.monotonic() - started < runs.PATIENCE + 2
    assert "did not record this run whole yet" in capsys.readouterr().err
    assert journal.status == "FINISHED" and not journal.is_sent


def test_nothing_is_recorded_where_it_is_off_or_mlflow_is_missing(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runs.training(load_params(), Settings(tracking=False), "f", {}) as run:
        run.record_params()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with runs.training(load_params(), Settings(tracking=True), "f", {}) as run:
        run.record_params()
    assert not (workplace / ".tracking").exists()


def test_full_disk_costs_the_record_and_not_the_training(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Journal, **record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    monkeypatch.setattr(runs.Recorder, "start_sender", lambda self: None)
    with runs.training(load_params(), Settings(tracking=True), "f", {}) as run:
        run.record_params()
    assert "The run lacks something (begin): [Errno 28]" in capsys.readouterr().err


# Once, whatever is lost


def make_journal(root: Path, uri: str, experiment: str, points: int = 250) -> Journal:
    journal = Journal.create(root, tracking_uri=uri, experiment=experiment, name="run", fingerprint="")
    journal.append(params={"epochs": 1}, tags={"git_commit": "unknown"})
    journal.append(dataset=metadata.dataset("digits", "0" * 32))
    at = journal.header.started
    for step in range(points):
        journal.append(metrics=[("loss", 1 / (step + 1), at + step, step), ("other", 0.5, at + step, step)])
    (root / "note.txt").write_text("note")
    journal.add_files({"reports/note.txt": root / "note.txt"})
    journal.append(status="FINISHED", time=at + points)
    return journal


def assert_whole(client: Any, experiment: str, points: int = 250) -> None:
    run = only_run(client, experiment)
    assert run.info.status == "FINISHED" and run.data.params == {"epochs": "1"}
    for metric in ("loss", "other"):
        assert steps(client, run, metric) == list(range(points))
    assert files_of(client, run) == {"reports/note.txt"}
    assert len(run.inputs.dataset_inputs) == 1


def deliver_until_sent(journal: Journal, client: Any) -> None:
    """As one sender after the other does, each where the one before it broke off."""
    for _ in range(200):
        try:
            sender.deliver(journal, client)
        except Exception:
            continue
        break
    assert journal.is_sent


@pytest.mark.parametrize("seed", range(3))
def test_lost_answers_lose_and_double_nothing(server: str, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    experiment = f"lossy-{seed}"
    with lossy_proxy(server, lambda method, path: draw.random() < 0.4) as address:
        journal = make_journal(tmp_path, address, experiment)
        deliver_until_sent(journal, connect(address))
    assert_whole(connect(server), experiment)


def test_lost_answer_to_create_leaves_one_run(server: str, tmp_path: Path) -> None:
    lost = []

    def loses(method: str, path: str) -> bool:
        if path.endswith("/runs/create") and not lost:
            lost.append(path)
            return True
        return False

    with lossy_proxy(server, loses) as address:
        journal = make_journal(tmp_path, address, "created")
        client = connect(address)
        with pytest.raises(Exception):
            sender.deliver(journal, client)
        assert sender.deliver(journal, client)
    assert lost
    assert_whole(connect(server), "created")


@pytest.mark.parametrize("lost_answers", [0.0, 0.3])
def test_gitlabs_own_api_takes_all_but_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_answers: float
) -> None:
    with GitLabEmulator() as gitlab:
        token = gitlab.state.add_token(gitlab.project, "api", access_level=30).value
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        path = f"/api/v4/projects/{gitlab.project.id}/ml/mlflow"
        draw = random.Random(1)
        with lossy_proxy(gitlab.url, lambda method, path: draw.random() < lost_answers) as proxy:
            journal = make_journal(tmp_path, f"{proxy}{path}", "gitlab", points=30)
            model = journal.outgoing("m") / "model"
            make_model_parts(model)
            journal.append(model="m")
            deliver_until_sent(journal, connect(f"{proxy}{path}"))
        client = connect(f"{gitlab.url}{path}")
        run = client.get_run(journal.sent.run_id)
        assert run.info.status == "FINISHED" and run.data.params == {"epochs": "1"}
        assert run.data.metrics["loss"] == pytest.approx(1 / 30)
        found = client.get_experiment_by_name("gitlab")
        assert len(client.search_runs([found.experiment_id])) == 1


def make_model_parts(folder: Path) -> None:
    facts = {"image_shape": [2, 2], "classes": 2, "class_names": ["a", "b"], "torch": "2.6.0"}
    facts |= {"model_sha256": "0" * 64, "requirements": ["mlflow==3.0"]}
    (folder / "extra_files").mkdir(parents=True)
    (folder / "extra_files/facts.json").write_text(json.dumps(facts))


def deliver_in_a_process(folder: str, uri: str) -> None:
    sender.METRICS_A_REQUEST = 20
    sender.deliver(Journal(Path(folder)), connect(uri))


def test_sender_killed_at_any_moment_loses_and_doubles_nothing(server: str, tmp_path: Path) -> None:
    journal = make_journal(tmp_path, server, "killed")
    context = multiprocessing.get_context("fork")
    draw = random.Random(0)
    connect(server)  # imports, once, for the forks
    for _ in range(8):
        process = context.Process(target=deliver_in_a_process, args=(str(journal.folder), server))
        process.start()
        process.join(draw.uniform(0.02, 0.3))
        process.kill()
        process.join()
    sender.deliver(journal, connect(server))
    assert journal.is_sent
    assert_whole(connect(server), "killed")


@pytest.mark.slow
def test_server_killed_and_restarted_loses_and_doubles_nothing(tmp_path: Path) -> None:
    from benchmarks import tracking

    result = tracking.restarts(tmp_path, count=3, points=60, kills=1)
    assert result == {"runs": 3, "expected": 3 * 60 * 2, "lost": 0, "doubled": 0, "unfinished": 0, "kills": 1}


@pytest.mark.slow
def test_runs_at_once_are_all_complete(tmp_path: Path) -> None:
    from benchmarks import tracking

    found = tracking.complete_runs(tmp_path, count=6, at_once=3)
    assert found["complete"] == 6, found


# The journal


def test_torn_last_line_is_left_out_and_the_next_record_is_whole(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, tracking_uri="sqlite://", experiment="e", name="n", fingerprint="")
    journal.append(tags={"a": "1"})
    with open(journal.path, "ab") as file:
        file.write(b'{"tags": {"b": ')
    assert journal.read()[0] == [{"tags": {"a": "1"}}]
    journal.append(tags={"c": "3"})
    records, end = journal.read()
    assert records == [{"tags": {"a": "1"}}, {"tags": {"c": "3"}}]
    assert journal.read(end) == ([], end)


def test_two_senders_do_not_send_one_run_at_once(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, tracking_uri="sqlite://", experiment="e", name="n", fingerprint="")
    with only_one(journal.folder / "sending"):
        assert not sender.deliver(journal, client=None)


def test_tidy_removes_what_is_sent_and_keeps_what_is_not(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sent, kept = (make_journal(tmp_path / "outbox", uri, "e", points=2) for _ in range(2))
    sender.deliver(sent, connect(uri))
    tidy(tmp_path / "outbox", sent.header.started)
    assert sent.folder.exists(), "evaluate may still have something to add"
    tidy(tmp_path / "outbox", sent.header.started + DAY)
    assert not sent.folder.exists() and kept.folder.exists()


def test_kept_file_is_the_one_of_its_time(tmp_path: Path) -> None:
    from ml import files

    journal = Journal.create(
        tmp_path / "outbox", tracking_uri="sqlite://", experiment="e", name="n", fingerprint=""
    )
    files.write_text(tmp_path / "report.md", "first")
    journal.add_files({"report.md": tmp_path / "report.md"})
    files.write_text(tmp_path / "report.md", "second")
    name = journal.read()[0][0]["files"]
    assert (journal.outgoing(name) / "report.md").read_text() == "first"


def test_params_that_the_launcher_has_set_otherwise_stay_as_they_are(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    experiment = client.create_experiment("launched", (tmp_path / "mlruns").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_param(run_id, "learning_rate", "1e-3")  # as `mlflow run -P learning_rate=1e-3` does
    journal = Journal.create(
        tmp_path / "outbox", tracking_uri=uri, experiment="x", name="n", fingerprint="", run_id=run_id
    )
    journal.append(params={"learning_rate": 0.001, "epochs": 1})
    assert sender.deliver(journal, client)
    assert only_run(client, "launched").data.params == {"learning_rate": "1e-3", "epochs": "1"}


def test_hash_of_a_folder_is_the_one_that_dvc_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a/c.txt", "a-b.txt"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(name)
    for command in (["init", "--no-scm", "--quiet"], ["add", "--quiet", "folder"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert f"md5: {metadata.dvc_md5(Path('folder'))}\n" in Path("folder.dvc").read_text()


@pytest.mark.parametrize(
    "text, mlflows, ours",
    [
        ("metrics.final_loss < 0.1", "metrics.final_loss < 0.1", []),
        ("params.learning_rate > 1e-3 and metrics.a < 1", "metrics.a < 1", [("learning_rate", ">", 1e-3)]),
        ("params.`train.epochs` >= 5", "", [("train.epochs", ">=", 5.0)]),
        ("params.schedule = 'cosine'", "params.schedule = 'cosine'", []),
        ("", "", []),
    ],
)
def test_filter_is_split_into_mlflows_part_and_ours(text: str, mlflows: str, ours: list[Any]) -> None:
    assert search.split_filter(text) == (mlflows, ours)


def test_addresses_are_told_without_password() -> None:
    told = server_client.without_password(
        "https://me:s@cret@mlflow.example/x and sqlite:////home/me@x/mlflow.db"
    )
    assert told == "https://mlflow.example/x and sqlite:////home/me@x/mlflow.db"


@pytest.mark.slow
def test_password_in_the_server_address_is_used_and_neither_printed_nor_kept(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://me:s3cr3t@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with runs.training(load_params(), Settings(tracking=True), "f", {}) as run:
        assert run.journal is not None
        runs.write_pointer(run.journal, {}, evaluated=False)
    root = workplace / ".tracking"
    _, kept = sender.flush(root)
    said = capsys.readouterr()
    assert "did not record this run whole yet" in said.err
    on_disk = b"".join(path.read_bytes() for path in workplace.rglob("*") if path.is_file())
    assert b"127.0.0.1" in on_disk and "127.0.0.1" in kept[0]
    assert "s3cr3t" not in f"{said} {kept}" and b"s3cr3t" not in on_disk
    (journal,) = journals(root)
    assert server_client.with_password(journal.header.tracking_uri) == uri


def test_database_that_cannot_be_opened_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender.signal, "signal", lambda *arguments: None)  # they are for a process of its own
    monkeypatch.setattr(sender.os, "setpriority", lambda *arguments: None)
    with pytest.raises(UserError, match=f"{tmp_path}/none/mlflow.db could not be opened as a database"):
        connect(f"sqlite:///{tmp_path}/none/mlflow.db")
    (tmp_path / "notes.txt").write_text("no database at all, but a text file" * 100)
    with pytest.raises(UserError, match="not a database"):
        connect(f"sqlite:///{tmp_path}/notes.txt")
    journal = make_journal(tmp_path / "outbox", f"sqlite:///{tmp_path}/none/mlflow.db", "e", points=2)
    assert sender.send_while_training(journal.folder) == 1
    assert "could not be opened" in str(journal.sent.error)


def test_flush_to_another_server_moves_what_theirs_has_nothing_of(tmp_path: Path) -> None:
    here, there = (f"sqlite:///{tmp_path}/{name}.db" for name in ("here", "there"))
    sent, kept = (make_journal(tmp_path / "outbox", here, "e", points=2) for _ in range(2))
    sender.deliver(sent, connect(here))
    assert sender.flush(tmp_path / "outbox", to="nonsense://x")[1], "no such server"
    assert kept.header.tracking_uri == here, "and nothing was moved to it"
    assert sender.flush(tmp_path / "outbox", to=there) == (1, [])
    assert kept.is_sent and kept.header.tracking_uri == there
    assert_whole(connect(there), "e", points=2)
    assert_whole(connect(here), "e", points=2)
