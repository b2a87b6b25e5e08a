"""The commands of MLproject: the pipeline with other parameters, in a folder of its own, the checkout untouched.

    mlflow run . --env-manager local -P epochs=1 -P train.shift_pixels=0

runs `dvc exp run --temp`: DVC copies the checkout as it is (uncommitted changes too), sets the parameters there, runs
the stages and keeps the result as an experiment, which `dvc exp show` lists and `dvc exp apply NAME` brings here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ml import files, git
from ml.errors import UserError, exit_on_user_error
from ml.lock import LOCK, flat
from ml.params import PARAMS_FILE, Params, parse_params, plain, read_yaml
from ml.settings import Settings, load_settings
from ml.tracking import metadata, runs, sender
from ml.tracking.client import absolute, connect, without_password
from ml.tracking.journal import Journal, now

UNCHANGED = "params.yaml"  # the default of every parameter in MLproject: what that file says


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """--epochs 1 --train.seeds "[0, 1]" → texts by name, those left out that stay as they are."""
    if len(arguments) % 2 or not all(name.startswith("--") for name in arguments[::2]):
        raise UserError(f"expected --NAME VALUE pairs, found: {' '.join(arguments)}")
    pairs = {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2])}
    return {name: value for name, value in pairs.items() if value != UNCHANGED}


def resolve(overrides: dict[str, str], tree: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key of params.yaml. Raises UserError that names every unknown key and every bad value."""
    known = flat(tree)
    short = {key.rsplit(".", 1)[-1]: key for key in known}
    unique = metadata.short_names(known)
    found, unknown = {}, []
    for name, text in overrides.items():
        key = name if name in known else short[name] if name in unique else None
        if key is None:
            unknown.append(name)
            continue
        try:
            found[key] = plain(YAML().load(StringIO(text)))  # as DVC reads it, so 1e-3 is a number
        except YAMLError:
            raise UserError(f"-P {name}={text!r} is not a YAML value.") from None
    if unknown:
        raise UserError(
            f"{PARAMS_FILE} has no key {', '.join(unknown)}; nothing was run. It has: {', '.join(sorted(known))}."
        )
    changed: dict[str, Any] = json.loads(json.dumps(tree))
    for key, value in found.items():
        section, _, last = key.rpartition(".")
        place = changed
        for part in section.split("."):
            place = place[part]
        place[last] = value
    parse_params(changed, f"{PARAMS_FILE} with -P", Params)
    return found


def quoted(value: Any) -> str:
    """For DVC's --set-param, whose grammar is Hydra's."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return json.dumps(value)


def run_experiment(target: str | None, values: dict[str, Any], name: str, settings: Settings) -> None:
    """Raises UserError when DVC fails; what the stage said is above then."""
    command = ["dvc", "exp", "run", "--temp", "--force", "--name", name]
    for key, value in values.items():
        command += ["--set-param", f"{key}={quoted(value)}"]
    here = {
        "MLFLOW_TRACKING_URI": absolute(settings.mlflow_tracking_uri),
        "TRACKING_FOLDER": str(settings.tracking_folder.absolute()),
        "DVC_NO_ANALYTICS": "1",
    }
    try:
        done = subprocess.run([*command, *([target] if target else [])], env={**os.environ, **here})
    except FileNotFoundError:
        raise UserError("The command `dvc` is missing. pip install 'ml[pipeline]'.") from None
    if done.returncode:
        raise UserError(f"`dvc exp run` failed with exit code {done.returncode}; {PARAMS_FILE} is as it was.")


def experiment_commit(name: str) -> str | None:
    listed = git.ask("for-each-ref", "--format=%(objectname) %(refname)", "refs/exps")
    found = [line.split(" ", 1) for line in listed.splitlines()]
    return next((commit for commit, ref in found if ref.endswith(f"/{name}")), None)


def tell_run(settings: Settings, name: str, commit: str) -> None:
    """The commit that holds params, code and dvc.lock of this run, put into the run."""
    if not settings.mlflow_run_id or not runs.is_on(settings):
        return
    journal = Journal.create(
        settings.tracking_folder.absolute(),
        tracking_uri=absolute(without_password(settings.mlflow_tracking_uri)),
        experiment=settings.mlflow_experiment_name,
        name=name,
        fingerprint="",
        run_id=settings.mlflow_run_id,
    )
    tags = {
        "git_commit": commit,
        "mlflow.source.git.commit": commit,
        "git_dirty": "false",
        "dvc_exp_name": name,
    }
    lock = git.show(commit, LOCK)
    if lock is not None:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, LOCK)
            copy.write_bytes(lock)
            tags["lock_sha256"] = files.sha256(copy)
            journal.add_files({LOCK: copy})
    journal.append(tags=tags)
    journal.append(status="FINISHED", time=now())
    try:
        sender.deliver(journal, connect(journal.header.tracking_uri))
    except Exception as error:
        why = sender.told(error)
        print(f"MLflow has not got the commit yet ({why}): `python -m ml.tracking flush`.", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ml.tracking.project", description="Run the pipeline with other parameters, elsewhere."
    )
    parser.add_argument("entry_point", choices=("main", "train"), help="main: all stages; train: up to train")
    arguments, rest = parser.parse_known_args()
    settings = load_settings()
    values = resolve(parse_overrides(rest), plain(read_yaml(PARAMS_FILE)))
    if not git.exists("HEAD"):
        raise UserError("this git repository has no commit yet, which `dvc exp run` needs.")
    if not files.DATA.exists():
        subprocess.run([sys.executable, "-m", "ml.task.dataset", "restore"], check=False)
    name = f"mlflow-{(settings.mlflow_run_id or os.urandom(4).hex())[:8]}"
    run_experiment(None if arguments.entry_point == "main" else "train", values, name, settings)
    commit = experiment_commit(name)
    if commit:
        tell_run(settings, name, commit)
    print(f"The result is DVC's experiment {name}: `dvc exp show`, `dvc exp apply {name}`.", file=sys.stderr)


if __name__ == "__main__":
    exit_on_user_error(main)
