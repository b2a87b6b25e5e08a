"""Many trainings at once that log to a tracking server: by this project's journals, or by one call a value.

    python -m tests.stack_load journals|calls FOLDER --runs 20 --seconds 8 --rate 25 --experiment load

A training takes `seconds` and makes `rate` values a second, each where it belongs in time; what it waits for the server
makes it longer. Address and credentials come from MLFLOW_TRACKING_*. The last line is JSON: for each training its
seconds, until the server has everything, and its errors.
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = ("loss", "accuracy", "gradient_norm", "learning_rate_now")
PARAMS = {f"train.param_{number}": str(number) for number in range(30)}
BETWEEN_BATCHES = 2.0  # seconds, as ml.tracking.sender has it


def value_of(step: int) -> float:
    return 1.0 / (step + 1)


def points(seconds: float, rate: float) -> Iterator[tuple[str, int]]:
    """(metric, step) when it is due; a training that is behind does not wait."""
    begun = time.monotonic()
    for number in range(int(seconds * rate)):
        time.sleep(max(0.0, begun + number / rate - time.monotonic()))
        yield METRICS[number % len(METRICS)], number // len(METRICS)


def train_with_journal(root: Path, experiment: str, seconds: float, rate: float, client: Any) -> list[str]:
    """As a stage does: write down, while a sender delivers now and then; at the end, wait until all has arrived."""
    import os

    from ml.tracking.journal import Journal, now, only_one
    from ml.tracking.sender import deliver

    uri = os.environ["MLFLOW_TRACKING_URI"]
    journal = Journal.create(root, tracking_uri=uri, experiment=experiment, name="load", fingerprint="load")
    errors: list[str] = []
    ended = threading.Event()

    def send() -> None:
        while True:
            last = ended.wait(BETWEEN_BATCHES)
            try:
                deliver(journal, client)
                if last and journal.is_sent:
                    return
            except Exception as error:  # whatever the server, the proxy or the network do
                errors.append(f"{type(error).__name__}: {error}"[:300])
                time.sleep(0.2)

    with only_one(journal.folder / "alive"):
        journal.append(params=PARAMS, tags={"git_commit": "0" * 40})
        sender = threading.Thread(target=send)
        sender.start()
        for metric, step in points(seconds, rate):
            journal.append(metrics=[(metric, value_of(step), now(), step)])
        journal.append(status="FINISHED", time=now())
        ended.set()
        sender.join()
    return errors


def train_with_calls(experiment_id: str, seconds: float, rate: float, client: Any) -> list[str]:
    """As most people write it: a call for each value, in the loop."""
    errors: list[str] = []
    run = client.create_run(experiment_id, tags={"git_commit": "0" * 40}).info.run_id
    for key, value in PARAMS.items():
        client.log_param(run, key, value)
    for metric, step in points(seconds, rate):
        try:
            client.log_metric(run, metric, value_of(step), step=step)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:300])
    client.set_terminated(run)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=["journals", "calls"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rate", type=float, default=25)
    parser.add_argument("--experiment", default="load")
    parser.add_argument("--wait", action="store_true", help="begin when standard input has a line")
    arguments = parser.parse_args()
    import os

    from ml.tracking.client import connect, experiment_id

    uri = os.environ["MLFLOW_TRACKING_URI"]
    client = connect(uri, timeout=30)
    experiment = experiment_id(client, uri, arguments.experiment)
    answers: list[dict[str, Any]] = []

    def one() -> None:
        begun = time.monotonic()
        options = (arguments.seconds, arguments.rate, client)
        try:
            if arguments.how == "journals":
                errors = train_with_journal(arguments.folder, arguments.experiment, *options)
            else:
                errors = train_with_calls(experiment, *options)
        except Exception as error:
            errors = [f"{type(error).__name__}: {error}"[:300]]
        answers.append({"seconds": time.monotonic() - begun, "errors": errors})

    print("ready", flush=True)
    if arguments.wait:
        sys.stdin.readline()
    # They begin one after the other within a second or so, as jobs do, so that their batches do not meet for ever.
    threads = [threading.Thread(target=one) for _ in range(arguments.runs)]
    for thread in threads:
        thread.start()
        time.sleep(BETWEEN_BATCHES / len(threads))
    for thread in threads:
        thread.join()
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
