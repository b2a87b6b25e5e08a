"""What each stage cost in this workspace, next to what it cost for the baseline."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ml import files
from ml.errors import UserError
from ml.lock import Lock
from ml.report.result import StageResult


class Cost(BaseModel):
    """reports/cost/STAGE.json, as ml.cost writes it."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    seconds: float
    peak_memory_mib: float
    device: str | None = None
    machine: str | None = None


def read_cost(folder: Path, stage: str) -> Cost | None:
    """None where the stage did not run there. Raises UserError when the file is damaged."""
    path = folder / f"{stage}.json"
    try:
        return Cost.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}). Delete it.") from None


def stage_results(candidate: Lock, baseline: Lock | None, baseline_costs: Path | None) -> list[StageResult]:
    """One row per stage of the candidate's dvc.lock, in its order."""
    rows = []
    for name, stage in candidate.stages.items():
        old = baseline.stages.get(name) if baseline else None
        cost = read_cost(files.COST, name)
        old_cost = read_cost(baseline_costs, name) if baseline_costs else None
        rows.append(
            StageResult(
                name=name,
                inputs_changed=old is None
                or (stage.command, stage.deps, stage.params) != (old.command, old.deps, old.params),
                outputs_changed=old is None or stage.outs != old.outs,
                ran=cost is not None,
                seconds=cost.seconds if cost else None,
                peak_memory_mib=cost.peak_memory_mib if cost else None,
                device=(cost.device or cost.machine) if cost else None,
                baseline_seconds=old_cost.seconds if old_cost else None,
                baseline_peak_memory_mib=old_cost.peak_memory_mib if old_cost else None,
            )
        )
    return rows
