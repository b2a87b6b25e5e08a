"""From the journals to the tracking server: everything once, whatever is killed, late or lost in between.

MLflow's requests cannot be undone or told apart when an answer is lost. So a session notes on disk that something is
on its way before it sends anything, and that all was answered when it ends. Where the second note is missing, the
server is asked what it has: the run by a tag of its own, each curve by its points, the model by its run. All else
(params, tags, files, status) can be sent twice without harm. A point keeps the time at which it was made, so even a
request that a slow server carries out after it was repeated adds nothing in an SQL store, whose key it is.
"""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml import files
from ml.tracking import client as server
from ml.tracking.journal import Journal, Sent, journals, now, only_one
from ml.tracking.model import write_description

METRICS_A_REQUEST, TEXTS_A_REQUEST = 1000, 100  # the most that a server takes
LONGEST = 5000  # characters of a param's or tag's value
BETWEEN_BATCHES = 2.0  # seconds
BETWEEN_SAMPLES = 10.0  # seconds, of system metrics: MLflow's own interval
ATTEMPTS, BETWEEN_ATTEMPTS = (
    3,
    0.5,
)  # of a flush for each run, and of a sender when the training is over; seconds
DYING = 2.0  # seconds that a killed training may still hold its lock
LAST_ATTEMPT = 120  # seconds; the stage itself waits less, and a killed one not at all
KEY_TAG = "tracking_key"
MODEL = "model"  # the logged model's name


class Sender:
    """One session with the server about one run. Hold the journal's lock `sending` meanwhile."""

    def __init__(self, journal: Journal, client: Any) -> None:
        self.journal, self.client = journal, client
        self.header, self.sent = journal.header, journal.sent
        self.fresh = self.sent.settled  # nothing can have arrived that is not in `sent`

    def note(self, **changes: Any) -> None:
        self.sent = self.sent.model_copy(update=changes)
        self.journal.set_sent(self.sent)

    def send(self) -> None:
        """Everything that is in the journal by now. Raises what the client raises; call again to go on."""
        records, end = self.journal.read(self.sent.offset)
        if not records and self.sent.run_id:
            return
        if self.sent.settled:
            self.note(settled=False)
        try:
            run_id = self.sent.run_id or self.find_or_create_run()
            self.send_records(run_id, records)
        except Exception as error:
            self.fresh = False  # it may have arrived all the same
            self.note(error=told(error))
            raise
        self.fresh = True
        self.note(offset=end, error=None)
        for record in records:
            for kind in ("files", "model"):
                if kind in record:
                    shutil.rmtree(self.journal.outgoing(record[kind]), ignore_errors=True)

    def settle(self) -> None:
        """All that was sent has been answered."""
        if self.fresh and not self.sent.settled:
            self.note(settled=True)

    def find_or_create_run(self) -> str:
        uri, name = self.header.tracking_uri, self.header.experiment
        if self.header.run_id:
            run = self.client.get_run(self.header.run_id)
            self.fresh = False  # somebody else has written into it
            self.note(run_id=self.header.run_id, experiment_id=run.info.experiment_id)
            return self.header.run_id
        experiment = self.sent.experiment_id or server.experiment_id(self.client, uri, name)
        run_id = None if self.fresh else self.find_run(experiment)
        if run_id is None:
            tags = {KEY_TAG: self.header.key}
            run = self.client.create_run(experiment, self.header.started, tags, self.header.name)
            run_id = str(run.info.run_id)
        self.note(run_id=run_id, experiment_id=experiment)
        return run_id

    def find_run(self, experiment: str) -> str | None:
        """The run of this journal on the server. The tag is compared here too: GitLab heeds no filter on tags."""
        found = self.client.search_runs([experiment], f"tags.{KEY_TAG} = '{self.header.key}'")
        return next((run.info.run_id for run in found if run.data.tags.get(KEY_TAG) == self.header.key), None)

    def send_records(self, run_id: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        params: dict[str, Any] = {}
        tags: dict[str, Any] = {}
        points: dict[tuple[str, int, int], float] = {}
        for record in records:
            params |= record.get("params", {})
            tags |= record.get("tags", {})
            points |= {(name, at, step): value for name, value, at, step in record.get("metrics", [])}
        if not self.fresh:
            params = self.without_known_params(run_id, params)
            points = self.without_known_points(run_id, points)
        metrics = [Metric(name, value, at, step) for (name, at, step), value in points.items()]
        texts = [[kind(key, str(value)[:LONGEST]) for key, value in values.items()]
                 for kind, values in ((Param, params), (RunTag, tags))]  # fmt: skip
        for part in slices(metrics, METRICS_A_REQUEST):
            self.client.log_batch(run_id, metrics=part)
        for part in slices(texts[0], TEXTS_A_REQUEST):
            self.client.log_batch(run_id, params=part)
        for part in slices(texts[1], TEXTS_A_REQUEST):
            self.client.log_batch(run_id, tags=part)
        for record in records:
            self.send_one(run_id, record)

    def send_one(self, run_id: str, record: dict[str, Any]) -> None:
        if "dataset" in record:
            self.send_dataset(run_id, record["dataset"])
        if "files" in record and self.journal.outgoing(record["files"]).is_dir():
            self.client.log_artifacts(run_id, str(self.journal.outgoing(record["files"])))
        if "model" in record and self.journal.outgoing(record["model"]).is_dir():
            self.send_model(run_id, self.journal.outgoing(record["model"]) / MODEL)
        if record.get("status") == "RUNNING":
            self.client.update_run(run_id, "RUNNING")
        elif "status" in record:
            self.client.set_terminated(run_id, record["status"], record["time"])

    def without_known_params(self, run_id: str, params: dict[str, Any]) -> dict[str, Any]:
        """A param can be set once; another run's launcher (`mlflow run`) may have set it in its own spelling."""
        known = self.client.get_run(run_id).data.params if params else {}
        return {key: value for key, value in params.items() if key not in known}

    def without_known_points(
        self, run_id: str, points: dict[tuple[str, int, int], float]
    ) -> dict[tuple[str, int, int], float]:
        known: set[tuple[str, int, int]] = set()
        for name in {name for name, _, _ in points}:
            try:
                history = self.client.get_metric_history(run_id, name)
                known |= {(name, point.timestamp, point.step) for point in history}
            except Exception as error:
                if not server.is_unsupported(error):
                    raise
                # GitLab tells only a metric's last point; points are sent in the order of their steps.
                last = self.client.get_run(run_id).data._metric_objs
                steps = [point.step for point in last if point.key == name]
                known |= {key for key in points if key[0] == name and steps and key[2] <= max(steps)}
        return {key: value for key, value in points.items() if key not in known}

    def send_dataset(self, run_id: str, described: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = DatasetInput(Dataset(**described), [InputTag("mlflow.data.context", "training")])
        try:
            self.client.log_inputs(run_id, [data])
        except Exception as error:
            if not server.is_unsupported(error):  # then the tags data_hash and dataset have to do
                raise

    def send_model(self, run_id: str, folder: Path) -> None:
        """As a logged model named `model`; where the server has none (GitLab), as the run's artifacts under model/."""
        from mlflow.entities import LoggedModelOutput

        write_description(folder)
        try:
            model_id = self.sent.model_id or self.find_or_create_model(run_id)
        except Exception as error:
            if not server.is_unsupported(error):
                raise
            self.client.log_artifacts(run_id, str(folder), MODEL)
            return
        self.note(model_id=model_id)
        self.client.log_model_artifacts(model_id, str(folder))
        self.client.finalize_logged_model(model_id, "READY")
        run = None if self.fresh else self.client.get_run(run_id)
        if run is None or model_id not in [each.model_id for each in run.outputs.model_outputs]:
            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])

    def find_or_create_model(self, run_id: str) -> str:
        experiment = self.sent.experiment_id
        if not self.fresh:
            found = self.client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
            if found:
                return str(found[0].model_id)
        return str(self.client.create_logged_model(experiment, MODEL, run_id).model_id)


def told(error: Exception) -> str:
    """What is noted of a failure; the client's messages have the whole address in them."""
    return server.without_password(f"{type(error).__name__}: {error}")[:500]


def slices(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def deliver(journal: Journal, client: Any) -> bool:
    """Send what a run still has to tell; False where another process is at it. Raises what the client raises."""
    with only_one(journal.folder / "sending") as held:
        if not held:
            return False
        mark_dead(journal)
        sender = Sender(journal, client)
        try:
            sender.send()
        finally:
            sender.settle()
    return True


def repeated(attempt: Callable[[], bool]) -> bool:
    """What `attempt` returns, the last of `ATTEMPTS` that fail raising what it raises."""
    for _ in range(ATTEMPTS - 1):
        try:
            return attempt()
        except Exception:
            time.sleep(BETWEEN_ATTEMPTS)
    return attempt()


def mark_dead(journal: Journal, patience: float = 0.0) -> None:
    """Note that a training was killed that can no longer say so itself.

    Args:
        patience: seconds to wait for its lock: a dying process ends our input a moment before it frees that.
    """
    until = time.monotonic() + patience
    while journal.status == "RUNNING":
        with only_one(journal.folder / "alive") as dead:
            if dead:
                journal.append(status="KILLED", time=now())
        if dead or time.monotonic() >= until:
            return
        time.sleep(0.05)


def flush(root: Path, skip: Path | None = None, to: str | None = None) -> tuple[int, list[str]]:
    """Send every run that has not been sent whole.

    Args:
        to: another server, for runs of which theirs has nothing.

    Returns:
        How many were sent, and for each that was not: which, and why.
    """
    clients: dict[str, Any] = {}
    other = server.without_password(to) if to else None
    done, kept = 0, []
    for journal in journals(root):
        if journal.folder == skip or (journal.is_sent and journal.status != "RUNNING"):
            continue
        try:
            theirs = journal.header.tracking_uri
            uri = other if other and not journal.sent.run_id else theirs
            if uri not in clients:
                clients[uri] = server.connect(to if to and uri == other else uri)
            if uri != theirs:
                move(journal, uri)
            if repeated(lambda: deliver(journal, clients[uri])):
                done += 1
            else:
                kept.append(f"{journal.folder}: another process is sending it")
        except Exception as error:  # its store's, its driver's or the network's
            kept.append(f"{journal.folder}: {told(error)}")
    return done, kept


def move(journal: Journal, uri: str) -> None:
    header = journal.header.model_copy(update={"tracking_uri": uri, "run_id": None})
    files.write_text(journal.folder / "run.json", header.model_dump_json(indent=2) + "\n")
    journal.set_sent(Sent())


def send_while_training(folder: Path) -> int:
    """The companion of a training: send what it writes until standard input ends, which it does with the training.

    Returns:
        0 when the server has everything; 1 when something is kept.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training; this ends after it
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 5)  # the training goes first
    journal = Journal(folder)
    with only_one(folder / "sending") as held:
        if not held:
            return 1
        try:
            client = server.connect(journal.header.tracking_uri, timeout=4)
        except Exception as error:  # a database that cannot be opened, an address of no known kind
            journal.set_sent(journal.sent.model_copy(update={"error": told(error)}))
            return 1
        (folder / "ready").touch()
        return watch(journal, Sender(journal, client))


def watch(journal: Journal, sender: Sender) -> int:
    from ml.tracking.system import SystemMetrics

    system = SystemMetrics(journal)
    over, others = False, True
    while True:
        over = over or bool(select.select([sys.stdin], [], [], 0)[0])
        if over:
            signal.alarm(LAST_ATTEMPT)
            system.sample(0)
            mark_dead(journal, DYING)
        sent = False
        for _ in range(ATTEMPTS if over else 1):
            try:
                sender.send()
                sent = True
                break
            except Exception as error:
                print(told(error), file=sys.stderr, flush=True)
                time.sleep(BETWEEN_ATTEMPTS if over else 0)
        if over:
            sender.settle()
            return 0 if sent else 1
        system.sample(BETWEEN_SAMPLES)
        if others and sent:
            others = False
            flush(journal.folder.parent, skip=journal.folder)
        over = bool(select.select([sys.stdin], [], [], BETWEEN_BATCHES)[0])
