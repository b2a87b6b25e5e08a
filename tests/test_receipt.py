"""The receipt: what it says of a job, and what is refused as one."""

import hashlib
import json
from pathlib import Path

import pytest

from ml.errors import UserError
from ml.release import receipt
from ml.release.receipt import StageRecord
from ml.settings import Settings

COMMIT, KEY, VALUE = "c" * 40, "a" * 64, "b" * 64
STAGE = StageRecord(name="train", key=KEY, value=VALUE, how="ran", seconds=1.5, device="cpu")
LOCK = """schema: '2.0'
stages:
  load:
    cmd: run
    deps:
    - {path: data, hash: md5, md5: 208acc9f65744ad2a8b38247aeafd586.dir}
    outs:
    - {path: artifacts/model.onnx, hash: md5, md5: 208acc9f65744ad2a8b38247aeafd586}
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """In a folder with a finished run, in a job of merge request 7."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(LOCK)
    Path("artifacts").mkdir()
    Path("artifacts/model.onnx").write_bytes(b"model")
    Path("reports").mkdir()
    Path("reports/metrics.json").write_text("{}")
    return Settings(
        ci_commit_sha=COMMIT,
        ci_job_id=11,
        ci_job_name="train",
        ci_job_url="https://gitlab.example/g/p/-/jobs/11",
        ci_job_image="registry.example/ci:1",
        ci_pipeline_id=5,
        ci_merge_request_iid=7,
        ci_merge_request_project_url="https://gitlab.example/g/p",
    )


def test_receipt_names_job_image_merge_request_and_the_hashes_of_what_lies_there(settings: Settings) -> None:
    receipt.write([STAGE], settings)
    found = json.loads(Path("reports/receipt.json").read_text())
    assert found["job"] | {"pipeline_url": None} == {
        "id": 11,
        "name": "train",
        "url": "https://gitlab.example/g/p/-/jobs/11",
        "pipeline_id": 5,
        "pipeline_url": None,
    }
    assert found["merge_request"] == {"iid": 7, "url": "https://gitlab.example/g/p/-/merge_requests/7"}
    assert (found["commit"], found["image"]) == (COMMIT, "registry.example/ci:1")
    assert found["lock_sha256"] == hashlib.sha256(LOCK.encode()).hexdigest()
    assert found["model_sha256"] == hashlib.sha256(b"model").hexdigest()
    assert found["results"] == {"reports/metrics.json": hashlib.sha256(b"{}").hexdigest()}
    assert found["data_hash"] == "208acc9f65744ad2a8b38247aeafd586.dir"
    assert found["stages"][0]["how"] == "ran" and found["stages"][0]["device"] == "cpu"
    assert receipt.load() == receipt.parse(Path("reports/receipt.json").read_bytes(), "again")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 2}', b"null", b'{"version": 1, "model_sha256": "short"}']
)
def test_what_is_no_receipt_is_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "receipt.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a receipt of this version.*Run the merge request's pipeline"):
        receipt.load(path)
    with pytest.raises(UserError, match="is missing. `python -m ml.release.pipeline` writes it"):
        receipt.load(tmp_path / "absent.json")


def test_stage_receipt_counts_only_for_the_run_that_it_names(settings: Settings) -> None:
    content = receipt.stage_receipt("train", KEY, VALUE, settings).model_dump_json().encode()
    found = receipt.parse_stage(content, KEY, VALUE)
    assert found and found.job and found.job.id == 11
    assert receipt.parse_stage(content, KEY, "0" * 64) is None
    assert receipt.parse_stage(None, KEY, VALUE) is None
    assert receipt.parse_stage(b"{", KEY, VALUE) is None
