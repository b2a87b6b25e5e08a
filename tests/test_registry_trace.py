"""The git tag as a piece of a version's trace: its sums are compared, and its message may be of any bytes."""

import os
import subprocess
from pathlib import Path

import pytest

from ml import files
from ml.lock import LOCK
from ml.settings import Settings
from ml.tracking import registry, trace
from ml.tracking.lifecycle import State
from ml.tracking.store import Registry, Version
from tests.gitlab_emulator_fixtures import IDENTITY
from tests.released import Releases, make_releases

TAG = "model-v1.2.0"


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    return make_releases(tmp_path_factory.mktemp("releases"))


@pytest.fixture
def evidence(releases: Releases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trace.Evidence:
    """Of the version that was registered from the tag, whose bundle lies in the version's files."""
    monkeypatch.chdir(releases.latest)
    (tmp_path / "bundle").symlink_to(releases.latest / "models" / TAG)
    bundled = releases.latest / "models" / TAG
    commit = git("rev-parse", f"{TAG}^{{commit}}").decode().strip()
    tags = {"model_tag": TAG, "git_commit": commit, "model_sha256": files.sha256(bundled / "model.onnx")}
    tags |= {"lock_sha256": files.sha256(Path(LOCK)), "data_hash": "any"}
    version = Version("ml", "3", "run", "models:/ml/3", tags)
    return trace.Evidence(version, State(), Registry(None, Settings()), Settings(), tmp_path)


def git(*arguments: str, text: bytes = b"") -> bytes:
    own = os.environ | IDENTITY
    done = subprocess.run(["git", *arguments], input=text, capture_output=True, check=True, env=own)
    return done.stdout


def retag(message: bytes) -> None:
    git("tag", "--force", "--annotate", "--file", "-", TAG, f"{TAG}^{{commit}}", text=message)


def test_tag_whose_message_is_no_utf8_is_read(evidence: trace.Evidence) -> None:
    retag(b"Gr\xf6\xdfer \xff\n\nModel-Sha256: " + evidence.tag("model_sha256").encode() + b"\n")
    assert trace.problem(trace.release, evidence) is None


@pytest.mark.parametrize("name", registry.BUNDLE_FILES)
def test_file_whose_sum_is_not_the_tags_is_no_whole_trace(evidence: trace.Evidence, name: str) -> None:
    right = files.sha256(evidence.file(f"bundle/{name}"))
    retag(f"Model\n\nSHA256SUMS\n{right}  {name}\n{'1' * 64}  model_card.md\n".encode())
    assert trace.problem(trace.release, evidence) is None
    retag(f"Model\n\nSHA256SUMS\n{'1' * 64}  {name}\n".encode())
    told = trace.problem(trace.release, evidence)
    assert told is not None and f"sha256 of bundle/{name} is {right}" in told and f"git tag {TAG}" in told


def test_name_that_is_no_utf8_is_written_with_a_replacement(
    releases: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(releases.latest)
    subprocess.run([b"git", b"config", b"user.name", b"Jos\xe9"], check=True)
    assert registry.who(Settings(gitlab_user_login=None, ci_job_url=None)).startswith("Jos\ufffd <")
