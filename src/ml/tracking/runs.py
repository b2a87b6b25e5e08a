"""What the stages write down of a run. Nothing here waits for a server, and no failure here ends a training.

train begins a run; evaluate, another process, goes on in it when the weights are that run's, else in a run of its own.
A child process sends the journal while it grows (ml.tracking.sender). Without MLflow, nothing is written down.
"""

import csv
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from ml import files
from ml.errors import UserError
from ml.lock import flat
from ml.params import Params
from ml.settings import Settings
from ml.tracking import metadata
from ml.tracking.client import absolute, without_password
from ml.tracking.journal import Journal, Point, Status, journals, now, only_one, tidy

if TYPE_CHECKING:  # both import torch, which the sender does without
    from torch.export import ExportedProgram

    from ml.fit import History, Progress

POINTER = files.REPORTS / "run.json"  # which run the last training is; no DVC output
PATIENCE = 5.0  # seconds that a finished stage waits for a server to take the rest
PATIENCE_HERE = 20.0  # the same for a local one, which may be slow on a busy machine but does not hang
ALSO_METRICS = ("learning_rate", "batch_size", "epochs")
REPORTS = (
    files.DATA_SUMMARY,
    files.DATA_CARD,
    files.VALIDATION,
    files.TRAIN_CURVE,
    files.VALIDATION_CURVE,
    files.METRICS,
    files.PER_SEED,
    files.PER_CLASS,
    files.CONFUSION,
    files.RELIABILITY,
)

Arguments = ParamSpec("Arguments")


def harmless(
    method: Callable[Concatenate["Recorder", Arguments], None],
) -> Callable[Concatenate["Recorder", Arguments], None]:
    """A failure of this method never reaches the stage: the run lacks what it would have recorded; a line says so."""

    def safe(self: "Recorder", /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if self.journal is None:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            print(f"The run lacks something ({method.__name__}): {error}", file=sys.stderr)

    return safe


class Recorder:
    """Writes one run's journal, with a child process that sends it. With no journal, every method does nothing."""

    def __init__(self, journal: Journal | None, params: Params) -> None:
        self.journal, self.params = journal, params
        self.sender: subprocess.Popen[bytes] | None = None
        self.inputs: threading.Thread | None = None
        self.known: set[tuple[str, int]] = set()  # points that an interrupted training has written
        self.losses: dict[int, dict[int, float]] = {}  # of each step, by seed
        self.locks = ExitStack()

    @harmless
    def begin(self, stage: str, tags: dict[str, str]) -> None:
        """Write down what is known before the work, and start the sender."""
        assert self.journal is not None
        self.locks.enter_context(only_one(self.journal.folder / "alive"))
        self.known = self.journal.points()
        self.start_sender()
        self.journal.append(tags=tags)
        # Hashing the inputs takes a moment, in which this process has nothing else to do.
        self.inputs = threading.Thread(target=self.record_inputs, args=(stage,), daemon=True)
        self.inputs.start()

    def start_sender(self) -> None:
        assert self.journal is not None
        (self.journal.folder / "ready").unlink(missing_ok=True)
        with open(self.journal.folder / "sender.log", "ab") as log:
            command = [sys.executable, "-m", "ml.tracking", "send", str(self.journal.folder)]
            quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            self.sender = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **quiet}
            )

    @harmless
    def record_inputs(self, stage: str) -> None:
        assert self.journal is not None
        self.journal.append(tags=metadata.inputs(stage))
        digest = metadata.data_hash()
        if digest:
            name = self.params.load.dataset
            self.journal.append(
                tags={"data_hash": digest, "dataset": name}, dataset=metadata.dataset(name, digest)
            )

    @harmless
    def record_params(self) -> None:
        assert self.journal is not None
        values = flat(self.params.model_dump(mode="json"))
        short = metadata.short_names(values)
        self.journal.append(params=values | short)
        # MLflow compares params as texts only; so that its filters can ask for > and <, these are metrics too.
        numbers = metadata.numbers(self.params.train.model_dump(mode="json"))
        self.metrics({name: numbers[name] for name in ALSO_METRICS}, 0)

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Write down points, but for those that are there from before an interruption."""
        assert self.journal is not None
        new = {name: value for name, value in values.items() if (name, step) not in self.known}
        self.known |= {(name, step) for name in new}
        if new:
            at = now()
            points: list[Point] = [(name, value, at, step) for name, value in new.items()]
            self.journal.append(metrics=points)

    @harmless
    def progress(self, seed: int, so_far: "Progress") -> None:
        self.points(seed, so_far.new_points)

    def points(self, seed: int, history: "History") -> None:
        """Of one seed; and of a step that every seed has passed, the mean loss."""
        for point in history.train:
            self.metrics({f"train_loss_seed_{seed}": point.loss}, point.step)
            losses = self.losses.setdefault(point.step, {})
            losses[seed] = point.loss
            if len(losses) == len(self.params.train.seeds):
                self.metrics({"train_loss": sum(losses.values()) / len(losses)}, point.step)
        for check in history.validation:
            found = {"validation_loss": check.loss, "validation_accuracy": check.accuracy}
            self.metrics({f"{name}_seed_{seed}": value for name, value in found.items()}, check.step)

    @harmless
    def trained(self, histories: list["History"], program: "ExportedProgram") -> None:
        """The training is done and its files are written: what the reports had not yet, outputs, model."""
        assert self.journal is not None
        seeds = self.params.train.seeds
        for seed, history in zip(seeds, histories):
            self.points(seed, history)
        self.validation_means(histories)
        self.record_training(max(history.train[-1].step for history in histories), program)

    def validation_means(self, histories: list["History"]) -> None:
        for checks in zip(*(history.validation for history in histories)):
            means = {
                "validation_loss": sum(check.loss for check in checks) / len(checks),
                "validation_accuracy": sum(check.accuracy for check in checks) / len(checks),
            }
            self.metrics(means, checks[0].step)

    def record_training(self, last_step: int, program: "ExportedProgram | None") -> None:
        """From the files that train has written."""
        assert self.journal is not None
        summary = files.read_json(files.VALIDATION, "train")
        curve = read_csv(files.TRAIN_CURVE)
        best = {f"best_{name}": float(value["mean"]) for name, value in summary.items()}
        self.metrics(best | {"final_loss": float(curve[-1]["train_loss"])}, last_step)
        outs = metadata.hashes("train", "outs") or {
            str(path): md5
            for path in (files.SEED_WEIGHTS, files.MODEL_ONNX)
            if (md5 := metadata.dvc_md5(path))
        }
        tags = {f"dvc.out.{path}": md5 for path, md5 in outs.items()}
        self.journal.append(tags=tags | {"model_sha256": files.sha256(files.MODEL_ONNX)})
        write_pointer(self.journal, outs, evaluated=False)
        self.add_model(program)

    @harmless
    def add_model(self, program: "ExportedProgram | None") -> None:
        from ml.tracking import model

        assert self.journal is not None
        name = secrets.token_hex(4)
        model.write_parts(self.journal.outgoing(name) / "model", program or model.export(), self.params)
        self.journal.append(model=name)

    @harmless
    def recover(self) -> None:
        """For a run that begins with evaluate, its training having been restored: the curves as DVC kept them."""
        assert self.journal is not None
        last_step = 0
        for path in (files.TRAIN_CURVE, files.VALIDATION_CURVE):
            for row in read_csv(path):
                step = int(float(row["step"]))
                last_step = max(last_step, step)
                left_out = ("step", "epoch", "learning_rate")
                self.metrics({key: float(value) for key, value in row.items() if key not in left_out}, step)
        self.record_training(last_step, None)

    @harmless
    def evaluated(self) -> None:
        """evaluate has written its files."""
        assert self.journal is not None
        step = int(float(read_csv(files.TRAIN_CURVE)[-1]["step"]))
        found: dict[str, float] = {}
        for name, estimate in files.read_json(files.METRICS, "evaluate").items():
            for key, value in estimate.items():
                found[name if key == "mean" else f"{name}_{key}"] = float(value)
        for row in read_csv(files.PER_SEED):
            seed = int(float(row.pop("seed")))
            found |= {f"{name}_seed_{seed}": float(value) for name, value in row.items()}
        self.metrics(found, step)
        self.journal.append(tags=metadata.outputs("evaluate"))
        places = {f"reports/{path.name}": path for path in REPORTS if path.is_file()}
        places |= {"plots": files.PLOTS} if files.PLOTS.is_dir() else {}
        self.journal.add_files(places | {"params.yaml": Path("params.yaml")})
        outs = metadata.hashes("train", "outs") | metadata.hashes("evaluate", "outs")
        write_pointer(self.journal, outs, evaluated=True)

    def close(self, status: Status) -> None:
        """The stage is over. Wait for the sender, but for no server longer than `PATIENCE`."""
        if self.inputs:
            self.inputs.join(PATIENCE)
        if self.journal is not None:
            with suppress(OSError):
                self.journal.append(status=status, time=now())
        self.stop()

    def stop(self) -> None:
        journal, self.journal = self.journal, None
        self.locks.close()
        if journal is None or self.sender is None:
            return
        online = journal.header.tracking_uri.startswith("http")
        ended = end_sender(self.sender, journal.folder, PATIENCE if online else PATIENCE_HERE)
        if ended != 0:
            why = journal.sent.error or "no answer in time"
            print(
                f"MLflow at {journal.header.tracking_uri} did not record this run whole yet: {why}\n"
                f"It is kept in {journal.folder}; the next training sends it, or `python -m ml.tracking flush`.",
                file=sys.stderr,
            )
        with suppress(UserError, OSError):
            refresh_pointer(journal)


def end_sender(sender: "subprocess.Popen[bytes]", folder: Path, patience: float) -> int | None:
    """Let the sender finish; end it when its server keeps it waiting. Its exit code; None where it was ended."""
    assert sender.stdin is not None
    with suppress(OSError):
        sender.stdin.close()
    asked = time.monotonic()
    ready: float | None = None
    try:
        while sender.poll() is None:
            at = time.monotonic()
            if ready is None and (folder / "ready").exists():
                ready = at
            if at - (asked if ready is None else ready) > (PATIENCE_HERE if ready is None else patience):
                return None
            time.sleep(0.01)
        return sender.returncode
    finally:
        if sender.poll() is None:
            sender.kill()
            sender.wait()


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Close the run with what became of the block."""
    status: Status = "FAILED"
    try:
        yield recorder
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        recorder.close(status)


def is_on(settings: Settings) -> bool:
    return settings.tracking and importlib.util.find_spec("mlflow") is not None


@contextmanager
def training(
    params: Params, settings: Settings, fingerprint: str, made_with: dict[str, Any], record: bool = True
) -> Iterator[Recorder]:
    """The run of a training.

    Args:
        fingerprint: of all that decides it; one that was interrupted goes on in its old run.
        made_with: device, threads, … as artifacts/training.json has them.
        record: False in all processes of torchrun but the first.
    """
    journal = None
    if record and is_on(settings):
        seeds = ",".join(map(str, params.train.seeds))
        journal = harmless_begin(settings, "train", f"{fingerprint}-{seeds}")
    recorder = Recorder(journal, params)
    with recording(recorder):
        made = {f"made_with.{key}": str(value) for key, value in made_with.items()}
        recorder.begin("train", describe(settings) | made | {"device": str(made_with.get("device"))})
        recorder.record_params()
        yield recorder


@contextmanager
def evaluation(params: Params, settings: Settings) -> Iterator[Recorder]:
    """The run of an evaluation: that of the training, or a new one where the weights are of no run that is known here."""
    journal, restored = None, False
    if is_on(settings):
        journal = run_of_the_weights(settings)
        restored = journal is None
        journal = journal or harmless_begin(settings, "evaluate", "")
    recorder = Recorder(journal, params)
    with recording(recorder):
        recorder.begin("evaluate", (describe(settings) | {"training": "restored"}) if restored else {})
        if restored:
            recorder.record_params()
            recorder.recover()
        yield recorder


def describe(settings: Settings) -> dict[str, str]:
    return metadata.machine() | metadata.ci(settings) | metadata.code()


def harmless_begin(settings: Settings, name: str, fingerprint: str) -> Journal | None:
    """The journal of an interrupted training with this fingerprint, else a new one; None where none can be written."""
    root = settings.tracking_folder.absolute()
    try:
        for journal in journals(root):
            if fingerprint and journal.header.fingerprint == fingerprint and journal.status != "FINISHED":
                with only_one(journal.folder / "alive") as dead:
                    if dead:
                        journal.append(status="RUNNING", time=now())
                        return journal
        tidy(root, now())
        return Journal.create(
            root,
            tracking_uri=absolute(without_password(settings.mlflow_tracking_uri)),
            experiment=settings.mlflow_experiment_name,
            name=run_name(),
            fingerprint=fingerprint,
            run_id=settings.mlflow_run_id,
        )
    except (UserError, OSError) as error:
        print(f"This run is not recorded: {error}", file=sys.stderr)
        return None


def run_name() -> str:
    """Branch or commit, so that a table of runs can be read."""
    commit = metadata.code()["git_commit"][:8]
    return f"{os.environ.get('CI_COMMIT_REF_NAME') or 'run'}-{commit}"


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_pointer(journal: Journal, outs: dict[str, str], evaluated: bool) -> None:
    header = journal.header
    files.write_json(
        POINTER,
        {
            "key": header.key,
            "folder": str(journal.folder),
            "tracking_uri": header.tracking_uri,
            "experiment": header.experiment,
            "run_id": journal.sent.run_id or header.run_id,
            "evaluated": evaluated,
            "outs": outs,
        },
    )


def read_pointer() -> dict[str, Any] | None:
    """reports/run.json; None where there is none that can be read."""
    try:
        found = json.loads(POINTER.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("outs"), dict) else None


def refresh_pointer(journal: Journal) -> None:
    """Put the run's id into reports/run.json once the server has given one."""
    found = read_pointer()
    if found and found["key"] == journal.header.key and journal.sent.run_id != found["run_id"]:
        files.write_json(POINTER, found | {"run_id": journal.sent.run_id})


def run_of_the_weights(settings: Settings) -> Journal | None:
    """The last training's run, if the weights that lie here are its own and it has not been evaluated yet."""
    found = read_pointer()
    weights = str(files.SEED_WEIGHTS)
    if not found or found["evaluated"] or found["outs"].get(weights) != metadata.dvc_md5(files.SEED_WEIGHTS):
        return None
    return journal_of(found, settings)


def journal_of(pointer: dict[str, Any], settings: Settings) -> Journal | None:
    """A journal that writes into the pointer's run; None where that cannot be."""
    try:
        if Path(pointer["folder"], "run.json").exists():
            return Journal(Path(pointer["folder"]))
        if not pointer["run_id"]:
            return None
        return Journal.create(
            settings.tracking_folder.absolute(),
            tracking_uri=pointer["tracking_uri"],
            experiment=pointer["experiment"],
            name="",
            fingerprint="",
            run_id=pointer["run_id"],
        )
    except (UserError, OSError, KeyError):
        return None
