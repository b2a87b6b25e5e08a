"""Runs and the tracking server.

python -m ml.tracking status    # what the server has not got yet
python -m ml.tracking flush     # send it
python -m ml.tracking finish    # after `dvc repro`: put dvc.lock, model card and bundle into the last run
python -m ml.tracking runs "params.learning_rate > 0.001 AND metrics.final_loss < 0.1"
"""

import argparse
import sys
from pathlib import Path

from ml.errors import UserError, exit_on_user_error
from ml.settings import Settings, load_settings
from ml.tracking import finish, runs, search, sender
from ml.tracking.journal import journals


def status(settings: Settings) -> None:
    for journal in journals(settings.tracking_folder):
        sent = journal.sent
        state = "sent" if journal.is_sent else f"kept ({sent.error or 'not tried yet'})"
        print(f"{journal.folder}  {journal.status}  run {sent.run_id or '-'}  {state}")


def flush(settings: Settings, to: str | None) -> None:
    """Raises UserError when something could not be sent."""
    done, kept = sender.flush(settings.tracking_folder.absolute(), to=to)
    for journal in journals(settings.tracking_folder):
        runs.refresh_pointer(journal)
    print(f"{done} runs sent, {len(kept)} kept.", file=sys.stderr)
    if kept:
        raise UserError("these could not be sent; they stay, try again:\n  " + "\n  ".join(kept))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.tracking", description="Runs and the tracking server."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="list the runs on disk, and what the server has of them")
    flushing = commands.add_parser(
        "flush", help="send what the server has not got yet; exit 1 if some is left"
    )
    flushing.add_argument("--to", metavar="URI", help="another server, for runs of which theirs has nothing")
    commands.add_parser("finish", help="put dvc.lock, model card and bundle into the last run, then flush")
    searching = commands.add_parser(
        "runs", help="list runs by a filter with numbers in it; best of a metric first"
    )
    searching.add_argument("filter", nargs="?", default="", help='such as "params.learning_rate > 0.001"')
    searching.add_argument("--by", metavar="METRIC", default="accuracy", help="order (accuracy)")
    sending = commands.add_parser("send", help="used by the stages: send a run while it goes on")
    sending.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "send":
        sys.exit(sender.send_while_training(arguments.folder))
    settings = load_settings()
    if arguments.command == "finish" and not runs.is_on(settings):
        print("No run is finished: MLflow is not installed here, or TRACKING is off.", file=sys.stderr)
        return
    if not runs.is_on(settings):
        raise UserError("MLflow is not installed here, or TRACKING is off. pip install 'ml[track]'.")
    if arguments.command == "status":
        status(settings)
    elif arguments.command == "flush":
        flush(settings, arguments.to)
    elif arguments.command == "finish":
        finish.finish(settings)
        sender.flush(settings.tracking_folder.absolute())  # what is kept is kept: no reason to fail
    else:
        search.main(settings, arguments.filter, arguments.by)


if __name__ == "__main__":
    exit_on_user_error(main)
