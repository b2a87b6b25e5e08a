"""What a pipeline did, as evidence: reports/receipt.json, and one receipt on the remote for each stage that ran."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ml import files, git
from ml.errors import UserError
from ml.lock import LOCK, read_lock
from ml.report.costs import read_cost
from ml.settings import Settings
from ml.validation import problems

RECEIPT = files.REPORTS / "receipt.json"
RESULTS = (files.METRICS, files.PREDICTIONS, files.TRAINING)

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(Frozen):
    """The job of GitLab's that did it."""

    id: int
    name: str | None
    url: str | None
    pipeline_id: int | None
    pipeline_url: str | None


class MergeRequest(Frozen):
    iid: int
    url: str | None


class StageRecord(Frozen):
    """One stage of this pipeline. `place`: the remote that it was restored from; `ran_in`: the job that ran it."""

    name: str
    key: Hash
    value: Hash
    how: Literal["ran", "restored"]
    place: str | None = None
    seconds: float | None = None
    device: str | None = None
    ran_in: str | None = None


class StageReceipt(Frozen):
    """receipts/KEY/VALUE.json on a remote: who ran the stage."""

    version: Literal[1] = 1
    stage: str
    key: Hash
    value: Hash
    commit: str
    created: datetime
    job: Job | None  # None: not in CI
    image: str | None
    seconds: float | None
    device: str | None


class Receipt(Frozen):
    version: Literal[1] = 1
    commit: str
    created: datetime
    job: Job | None
    merge_request: MergeRequest | None
    image: str | None
    runner: str | None
    lock_sha256: Hash
    data_hash: str
    model_sha256: Hash | None
    golden_sha256: Hash | None
    results: dict[str, Hash]  # path to sha256
    stages: list[StageRecord]


def job_of(settings: Settings) -> Job | None:
    if settings.ci_job_id is None:
        return None
    return Job(
        id=settings.ci_job_id,
        name=settings.ci_job_name,
        url=settings.ci_job_url,
        pipeline_id=settings.ci_pipeline_id,
        pipeline_url=settings.ci_pipeline_url,
    )


def stage_receipt(stage: str, key: str, value: str, settings: Settings) -> StageReceipt:
    """Of a stage that has just run here."""
    cost = read_cost(files.COST, stage)
    return StageReceipt(
        stage=stage,
        key=key,
        value=value,
        commit=settings.ci_commit_sha or git.head(),
        created=datetime.now(UTC),
        job=job_of(settings),
        image=settings.ci_job_image,
        seconds=cost.seconds if cost else None,
        device=(cost.device or cost.machine) if cost else None,
    )


def write(stages: list[StageRecord], settings: Settings, path: Path = RECEIPT) -> Receipt:
    """Raises UserError when dvc.lock is missing or the file cannot be written."""
    iid, project = settings.ci_merge_request_iid, settings.ci_merge_request_project_url
    lock = read_lock()
    receipt = Receipt(
        commit=settings.ci_commit_sha or git.head(),
        created=datetime.now(UTC),
        job=job_of(settings),
        merge_request=(
            MergeRequest(iid=iid, url=f"{project}/-/merge_requests/{iid}" if project else None)
            if iid
            else None
        ),
        image=settings.ci_job_image,
        runner=settings.ci_runner_description,
        lock_sha256=files.sha256(Path(LOCK)),
        data_hash=lock.sources.get(str(files.DATA), "unknown"),
        model_sha256=hash_of(files.MODEL_ONNX),
        golden_sha256=hash_of(files.GOLDEN),
        results={str(path): found for path in RESULTS if (found := hash_of(path))},
        stages=stages,
    )
    files.write_text(path, receipt.model_dump_json(indent=2) + "\n")
    return receipt


def hash_of(path: Path) -> str | None:
    return files.sha256(path) if path.is_file() else None


def load(path: Path = RECEIPT) -> Receipt:
    """Raises UserError when there is none, or it is damaged or of another version."""
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. `python -m ml.release.pipeline` writes it.") from None


def parse(content: bytes, source: str) -> Receipt:
    try:
        return Receipt.model_validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"{source} is not a receipt of this version ({problems(error)}). Run the merge request's pipeline again."
        ) from None


def parse_stage(content: bytes | None, key: str, value: str) -> StageReceipt | None:
    """None when there is none, or it is not the one of this run."""
    try:
        found = StageReceipt.model_validate_json(content or b"")
    except ValidationError:
        return None
    return found if (found.key, found.value) == (key, value) else None
