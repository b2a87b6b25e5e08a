"""data/, the raw data: brought to what data.dvc says."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ml import files
from ml.errors import UserError


def restore(name: str, fetch: Callable[[Path], None] | None) -> None:
    """Make data/ what data.dvc says: from the cache or the DVC remote, else by `fetch`, and compare.

    Args:
        name: load.dataset in params.yaml.
        fetch: puts the raw files of `name` into a folder; None for data that only DVC has.

    Raises:
        UserError: neither works, or data/ holds something else that would be lost.
    """
    if same_bytes():
        print("data/ is what data.dvc says.", file=sys.stderr)
        return
    if files.DATA.exists():
        raise UserError(
            "data/ differs from what data.dvc says.\n"
            "To keep it: `dvc add data`. To drop it: remove data/, then `make data`."
        )
    pulled = subprocess.run(["dvc", "pull", "--quiet", "data.dvc"], capture_output=True, text=True)
    if pulled.returncode == 0 and same_bytes():
        print("data/ restored by DVC.", file=sys.stderr)
        return
    why = (pulled.stderr.strip().splitlines() or ["no answer"])[-1]
    if fetch is None:
        raise UserError(
            f"data.dvc could not be pulled ({why}), and load.dataset in params.yaml is {name}, which has no mirror.\n"
            "Configure the DVC remote that has the data (`dvc remote list`), or copy the files into data/."
        )
    print(f"DVC has no copy ({why}); fetching {name} instead.", file=sys.stderr)
    fetch(files.DATA)
    if not same_bytes():
        raise UserError(
            f"data.dvc tracks other bytes than those of {name}, which load.dataset in params.yaml names.\n"
            f"To change the data to {name}: `dvc add data`. To keep what data.dvc says: pull it from a DVC remote."
        )


def same_bytes() -> bool:
    """Whether data/ is what data.dvc says; if so it is in DVC's cache from now on, ready to be pushed."""
    if not files.DATA.exists():
        return False
    state = tracked_state()
    if state == "not in cache":
        subprocess.run(["dvc", "commit", "--quiet", "--force", "data.dvc"], check=True)
    return state in ("same", "not in cache")


def tracked_state() -> str:
    """How data/ compares with data.dvc: "same", "not in cache" (the same bytes) or "modified"."""
    answer = subprocess.run(["dvc", "status", "--json", "data.dvc"], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"`dvc status data.dvc` failed: {answer.stderr.strip()}")
    for change in json.loads(answer.stdout).get("data.dvc", []):
        state: str = change["changed outs"]["data"]
        return state
    return "same"
