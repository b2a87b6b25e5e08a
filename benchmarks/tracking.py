"""Figures of the tracking, with real MLflow servers (sqlite) and no network:

    python -m benchmarks.tracking complete    # 200 runs, 16 at once: how many have all of their metadata
    python -m benchmarks.tracking restarts    # 20 runs, the server killed and restarted meanwhile: values lost, doubled
    python -m benchmarks.tracking overhead    # training with tracking against training without
    python -m benchmarks.tracking seconds     # of one run, after imports, on a warm sqlite database

Each prints JSON. The small forms of the first two are tests.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from ml import files
from ml.fit import History, Progress, TrainPoint, ValidationPoint
from ml.lock import flat
from ml.params import apply_preset, load_params
from ml.settings import Settings
from ml.tracking import client as server_client
from ml.tracking import metadata, model, runs, sender
from ml.tracking.journal import journals

ROOT = Path(__file__).parents[1]
JOB = {
    "ci_project_url": "https://gitlab.example/g/p",
    "ci_job_id": 7,
    "ci_pipeline_id": 5,
    "ci_merge_request_iid": 3,
}
NEEDED_TAGS = {
    "git_commit",
    "git_dirty",
    "data_hash",
    "model_sha256",
    "device",
    "ci_job_url",
    "ci_pipeline_url",
    "merge_request_url",
    "version.python",
    "version.torch",
    "version.mlflow",
    "made_with.cpu_capability",
}


class Server:
    """A real MLflow server in `folder`, to be killed and started again on the same port and database."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PYTHONWARNINGS": "ignore"}
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **quiet}
            )
        for _ in range(600):
            try:
                if requests.get(f"{self.address}/health", timeout=5).ok:
                    return
            except requests.RequestException:
                time.sleep(0.1)
        raise RuntimeError(f"the MLflow server did not start: {self.folder / 'server.log'}")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    try:
        yield server
    finally:
        server.kill()


def python(folder: Path, *arguments: str, **more: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")


def trained_project(folder: Path, seeds: str = "[0, 1]") -> Path:
    """A git repository with the pipeline's files, in which all stages have run on digits, not recorded."""
    folder.mkdir(parents=True)
    for name in ("dvc.yaml", "constraints.txt", "params.yaml", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src" / "ml", folder / "src" / "ml", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "small.yaml").write_text(
        f"train: {{seeds: {seeds}, epochs: 2, log_every: 5}}\nevaluate: {{resamples: 200}}\n"
    )
    os.chdir(folder)
    apply_preset(ROOT / "presets" / "digits.yaml")
    apply_preset(folder / "small.yaml")
    python(folder, "-m", "ml.task.dataset", "fetch", "digits", "--to", "data")
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "Begin"]):
        subprocess.run(["git", "-c", "user.name=b", "-c", "user.email=b@localhost", *command], check=True)
    for stage in ("load", "preprocess", "train", "evaluate"):
        python(folder, "-m", f"ml.stages.{stage}", TRACKING="off")
    return folder


def histories() -> list[History]:
    """The curves of the last training, one for each seed, from its files."""
    train, validation = runs.read_csv(files.TRAIN_CURVE), runs.read_csv(files.VALIDATION_CURVE)
    found = []
    for seed in load_params().train.seeds:
        points = [
            TrainPoint(
                int(row["step"]),
                float(row["epoch"]),
                float(row["learning_rate"]),
                float(row[f"train_loss_seed_{seed}"]),
            )
            for row in train
        ]
        checks = [
            ValidationPoint(
                int(row["step"]),
                int(float(row["epoch"])),
                float(row[f"validation_loss_seed_{seed}"]),
                float(row[f"validation_accuracy_seed_{seed}"]),
            )
            for row in validation
        ]
        found.append(History(points, checks))
    return found


def record_run(settings: Settings, program: Any) -> None:
    """All that train and evaluate record, without the training between."""
    params, curves = load_params(), histories()
    with runs.training(params, settings, "", {"device": "cpu", "cpu_capability": "x"}) as run:
        for seed, history in zip(params.train.seeds, curves):
            for point in history.train:
                run.progress(seed, Progress(0, point.loss, None, History([point], [])))
        run.trained(curves, program)
    with runs.evaluation(params, settings) as run:
        run.evaluated()


def complete_runs(folder: Path, count: int, at_once: int) -> dict[str, Any]:
    """Record `count` runs, `at_once` at a time, each in a folder of its own; then ask the server what is missing."""
    here = Path.cwd()
    try:
        project = trained_project(folder / "project")
        with serving(folder / "server") as server:
            started = time.monotonic()
            context = multiprocessing.get_context("fork")
            program = model.export()
            numbers = context.Value("i", 0)
            workers = [
                context.Process(
                    target=record_many, args=(folder, project, server.address, numbers, count, program)
                )
                for _ in range(at_once)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            late = sum(flush_all(folder.glob("run-*"), server.address))
            seconds = time.monotonic() - started
            os.chdir(project)
            return check_complete(server.address) | {
                "asked": count,
                "at_once": at_once,
                "sent_by_flush": late,
                "seconds": round(seconds, 1),
            }
    finally:
        os.chdir(here)


def record_many(folder: Path, project: Path, address: str, numbers: Any, count: int, program: Any) -> None:
    while True:
        with numbers.get_lock():
            numbers.value += 1
            number = numbers.value
        if number > count:
            return
        place = folder / f"run-{number}"
        shutil.copytree(project, place, copy_function=os.link)
        os.chdir(place)
        record_run(Settings(mlflow_tracking_uri=address, tracking=True, **JOB), program)  # type: ignore[arg-type]


def flush_all(places: Iterator[Path], address: str) -> list[int]:
    sent = []
    for place in places:
        done, kept = sender.flush(place / ".tracking")
        sent.append(done)
        if kept:
            print("\n".join(kept), file=sys.stderr)
    return sent


def check_complete(address: str) -> dict[str, Any]:
    client = server_client.connect(address)
    params, curves = load_params(), histories()
    experiment = client.get_experiment_by_name("ml").experiment_id
    found = client.search_runs([experiment], max_results=5000)
    problems: dict[str, int] = {}
    complete = 0
    for run in found:
        missing = missing_of(client, run, params, curves)
        complete += not missing
        for each in missing:
            problems[each] = problems.get(each, 0) + 1
    return {"runs": len(found), "complete": complete, "missing": problems}


def missing_of(client: Any, run: Any, params: Any, curves: list[History]) -> list[str]:
    """What a run lacks of all that the documentation promises, by name."""
    missing = [f"status {run.info.status}"] if run.info.status != "FINISHED" else []
    wanted = flat(params.model_dump(mode="json"))
    missing += [f"param {key}" for key, value in wanted.items() if run.data.params.get(key) != str(value)]
    hashes = {
        f"dvc.{side}.{path}"
        for stage in ("train", "evaluate")
        for side, kind in (("in", "deps"), ("out", "outs"))
        for path in metadata.stage_files(stage, kind)
        if Path(path).exists() and not (side == "in" and stage == "evaluate" and path.startswith("src/"))
    }
    missing += [f"tag {tag}" for tag in NEEDED_TAGS | hashes if tag not in run.data.tags]
    for seed, history in zip(params.train.seeds, curves):
        for name, points in (("train_loss", history.train), ("validation_accuracy", history.validation)):
            got = [point.step for point in client.get_metric_history(run.info.run_id, f"{name}_seed_{seed}")]
            if got != [point.step for point in points]:
                missing.append(f"curve {name}_seed_{seed}")
    for name in ("train_loss", "final_loss", "accuracy", "accuracy_low", "system/cpu_utilization_percentage"):
        if name not in run.data.metrics:
            missing.append(f"metric {name}")
    missing += [] if [each.dataset.digest for each in run.inputs.dataset_inputs] else ["dataset"]
    artifacts = {
        each.path
        for folder in ("plots", "reports")
        for each in client.list_artifacts(run.info.run_id, folder)
    }
    missing += [
        f"artifact {path}"
        for path in ("plots/training_curves.png", "reports/metrics.json")
        if path not in artifacts
    ]
    models = [each.model_id for each in run.outputs.model_outputs]
    if len(models) != 1 or str(client.get_logged_model(models[0]).status) != "READY":
        missing.append("model")
    elif "MLmodel" not in {each.path for each in client.list_logged_model_artifacts(models[0])}:
        missing.append("MLmodel")
    return missing


def restarts(folder: Path, count: int, points: int, kills: int) -> dict[str, int]:
    """`count` runs at once write `points` points of two curves each while the server is killed `kills` times."""
    here = Path.cwd()
    try:
        project = folder / "project"
        project.mkdir(parents=True)
        shutil.copyfile(ROOT / "params.yaml", project / "params.yaml")
        os.chdir(project)
        with serving(folder / "server") as server:
            context = multiprocessing.get_context("fork")
            writers = [
                context.Process(target=write_points, args=(number, points, server.address))
                for number in range(count)
            ]
            for writer in writers:
                writer.start()
            draw = random.Random(0)
            for _ in range(kills):
                time.sleep(draw.uniform(2, 5))
                server.kill()
                time.sleep(draw.uniform(0.5, 2))
                server.start()
            for writer in writers:
                writer.join()
            for _ in range(5):
                if not sender.flush(project / ".tracking")[1]:
                    break
                time.sleep(2)
            return count_points(server.address, count, points) | {"kills": kills}
    finally:
        os.chdir(here)


def write_points(number: int, points: int, address: str) -> None:
    """A training of about twelve seconds, as far as the tracking sees one."""
    settings = Settings(mlflow_tracking_uri=address, mlflow_experiment_name="restarts", tracking=True)
    with runs.training(load_params(), settings, f"run-{number}", {}) as run:
        for step in range(points):
            run.metrics({"loss": 1 / (step + 1), "other": step + 0.5}, step)
            time.sleep(12 / points)


def count_points(address: str, count: int, points: int) -> dict[str, int]:
    client = server_client.connect(address)
    experiment = client.get_experiment_by_name("restarts").experiment_id
    found = client.search_runs([experiment], max_results=5000)
    lost = doubled = unfinished = 0
    for run in found:
        unfinished += run.info.status != "FINISHED"
        for name in ("loss", "other"):
            steps = [point.step for point in client.get_metric_history(run.info.run_id, name)]
            lost += len(set(range(points)) - set(steps))
            doubled += len(steps) - len(set(steps))
    lost += (count - len(found)) * 2 * points if len(found) < count else 0
    return {
        "runs": len(found),
        "expected": count * points * 2,
        "lost": lost,
        "doubled": doubled,
        "unfinished": unfinished,
    }


def overhead(folder: Path, pairs: int, epochs: int, data: Path | None) -> dict[str, Any]:
    """Seconds in the training loops and of the whole stage, with tracking to a server and without, in turn."""
    here = Path.cwd()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
        os.chdir(folder)
        if data:
            shutil.copytree(data, folder / "data")
        else:
            apply_preset(ROOT / "presets" / "digits.yaml")
            python(folder, "-m", "ml.task.dataset", "fetch", "digits", "--to", "data")
        (folder / "more.yaml").write_text(f"train: {{epochs: {epochs}, seeds: [0, 1]}}\n")
        apply_preset(folder / "more.yaml")
        for stage in ("load", "preprocess"):
            python(folder, "-m", f"ml.stages.{stage}", TRACKING="off")
        found: dict[str, list[tuple[float, float]]] = {"off": [], "on": []}
        with serving(folder / "server") as server:
            python(folder, "-m", "ml.stages.train", TRACKING="on", MLFLOW_TRACKING_URI=server.address)  # warm
            for _ in range(pairs):
                for switch, seconds in found.items():
                    started = time.monotonic()
                    python(
                        folder, "-m", "ml.stages.train", TRACKING=switch, MLFLOW_TRACKING_URI=server.address
                    )
                    whole = time.monotonic() - started
                    seconds.append(
                        (json.loads((files.COST / "train.json").read_text())["fit_seconds"], whole)
                    )
        fit, stage = ({switch: statistics.median(each[index] for each in seconds) for switch, seconds in found.items()}
                      for index in (0, 1))  # fmt: skip
        return {
            "pairs": pairs,
            "fit_seconds": fit,
            "stage_seconds": {key: round(value, 2) for key, value in stage.items()},
            "overhead_on_training_percent": round(100 * (fit["on"] / fit["off"] - 1), 2),
            "all_fit_seconds": {key: [each[0] for each in seconds] for key, seconds in found.items()},
        }
    finally:
        os.chdir(here)


def run_seconds(folder: Path, count: int) -> dict[str, Any]:
    """What one run takes with all imported and the database warm: writing it down, and sending it."""
    here = Path.cwd()
    try:
        project = trained_project(folder / "project")
        settings = Settings(mlflow_tracking_uri=f"sqlite:///{folder}/mlflow.db", tracking=True, **JOB)  # type: ignore[arg-type]
        program, client = model.export(), server_client.connect(f"sqlite:///{folder}/mlflow.db")
        runs.Recorder.start_sender = lambda self: None  # type: ignore[method-assign]
        written, sent, busy = [], [], []
        for _ in range(count + 1):
            os.chdir(project)
            started, busy_before = time.monotonic(), time.process_time()
            record_run(settings, program)
            between = time.monotonic()
            (journal,) = [each for each in journals(project / ".tracking") if not each.is_sent]
            sender.deliver(journal, client)
            written.append(between - started)
            sent.append(time.monotonic() - between)
            busy.append(time.process_time() - busy_before)
        return {
            "runs": count,
            "write_seconds": round(statistics.median(written[1:]), 3),
            "send_seconds": round(statistics.median(sent[1:]), 3),
            "cpu_seconds": round(statistics.median(busy[1:]), 3),
            "together": round(statistics.median(a + b for a, b in list(zip(written, sent))[1:]), 3),
        }
    finally:
        os.chdir(here)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__.split("\n")[0])
    parser.add_argument("figure", choices=("complete", "restarts", "overhead", "seconds"))
    parser.add_argument("--runs", type=int, help="how many (200, 20, 5 pairs, 10)")
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument(
        "--epochs", type=int, default=200, help="of the training that overhead is measured on"
    )
    parser.add_argument("--data", type=Path, help="raw data for overhead, with params.yaml as it is (digits)")
    arguments = parser.parse_args()
    data = arguments.data.absolute() if arguments.data else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.figure == "complete":
            found = complete_runs(folder, arguments.runs or 200, arguments.at_once)
        elif arguments.figure == "restarts":
            found = restarts(folder, arguments.runs or 20, points=200, kills=3)
        elif arguments.figure == "overhead":
            found = overhead(folder, arguments.runs or 5, arguments.epochs, data)
        else:
            found = run_seconds(folder, arguments.runs or 10)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
