"""Whether a registered version leads back to its code, data, params and results: each piece is checked for truth.

That a piece is there says little. The commit must be in this repository, the hashes must be those in its dvc.lock, the
params those in its params.yaml, the files those whose hashes the tags and the lock say, and the run and the comment must
exist. So nobody gets a model into production by filling in tags.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ml import bundle, files, git
from ml.bundle import Experiment
from ml.errors import UserError
from ml.lock import LOCK, Lock, parse_lock
from ml.params import PARAMS_FILE, plain
from ml.settings import Settings
from ml.tracking.lifecycle import State
from ml.tracking.registry import BUNDLE_FILES, GATES
from ml.tracking.store import MANIFEST, METRICS_FILE, Registry, Version, manifest, numbers, texts

NOTE = re.compile(r"(https?://[^/\s]+/\S+?)/-/merge_requests/(\d+)(?:#note_(\d+))?")
COMMIT_NOTE = re.compile(r"(https?://[^/\s]+/\S+?)/-/commit/([0-9a-f]{40,64})(?:#note_(\d+))?")
# In a release tag's message: the SHA-256 of each of its files.
SUM = re.compile(r"(?m)^([0-9a-f]{64})  (\S+)$")


class Missing(Exception):
    """A piece of the trace is not there, or is not what it says. The message names what was found."""


@dataclass(frozen=True)
class Finding:
    piece: str
    problem: str | None  # None: it is there and true


@dataclass(frozen=True)
class Evidence:
    """What the checks look at. `folder` has the files of the version."""

    version: Version
    state: State
    registry: Registry
    settings: Settings
    folder: Path

    def tag(self, key: str) -> str:
        value = self.version.tags.get(key, "")
        if not value:
            raise Missing(f"the version has no tag {key}")
        return value

    def json_tag(self, key: str) -> Any:
        try:
            return json.loads(self.tag(key))
        except ValueError:
            raise Missing(f"tag {key} is not JSON") from None

    def file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise Missing(f"{name} is missing from its artifacts")
        return path

    @cached_property
    def experiment(self) -> Experiment:
        path = self.file(f"bundle/{bundle.EXPERIMENT}")
        return bundle.parse_experiment(path.read_bytes(), f"bundle/{bundle.EXPERIMENT}")

    @cached_property
    def commit(self) -> str:
        commit = self.tag("git_commit")
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit) or not git.exists(commit):
            raise Missing(
                f"{commit} is no commit of this repository (fetch the whole history, then check again)"
            )
        return commit

    def committed(self, path: str) -> bytes:
        content = git.show(self.commit, path)
        if content is None:
            raise Missing(f"commit {self.commit[:8]} has no {path}")
        return content

    @cached_property
    def lock(self) -> Lock:
        return parse_lock(self.committed(LOCK), f"{LOCK} of {self.commit[:8]}")


def check(
    registry: Registry, version: Version, state: State, settings: Settings, folder: Path
) -> list[Finding]:
    """One finding for each piece. `folder` is where the version's files have been downloaded to."""
    evidence = Evidence(version, state, registry, settings, folder)
    return [Finding(piece, problem(look, evidence)) for piece, look in PIECES.items()]


def problem(look: Callable[[Evidence], None], evidence: Evidence) -> str | None:
    try:
        look(evidence)
    except (Missing, UserError) as error:
        return str(error).splitlines()[0]
    return None


def same(what: str, found: object, expected: object, where: str) -> None:
    if found != expected:
        raise Missing(f"{what} is {shorten(found)}, but {where} says {shorten(expected)}")


def shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def trail(evidence: Evidence) -> None:
    same(
        "its tag model_tag",
        evidence.tag("model_tag"),
        evidence.state.tags.get(evidence.version.version),
        "the trail",
    )


def code(evidence: Evidence) -> None:
    same("git_commit", evidence.commit, evidence.experiment.git_commit, bundle.EXPERIMENT)


def lock(evidence: Evidence) -> None:
    found = hashlib.sha256(evidence.committed(LOCK)).hexdigest()
    same("lock_sha256", evidence.tag("lock_sha256"), found, f"{LOCK} of the commit")
    same("lock_sha256", evidence.tag("lock_sha256"), evidence.experiment.lock_sha256, bundle.EXPERIMENT)


def data(evidence: Evidence) -> None:
    expected = evidence.lock.sources.get(str(files.DATA))
    same("data_hash", evidence.tag("data_hash"), expected, f"{LOCK} of the commit")
    same("data_hash", evidence.tag("data_hash"), evidence.experiment.data_hash, bundle.EXPERIMENT)


def params(evidence: Evidence) -> None:
    """Those of params.yaml in the commit, and, as far as dvc.lock has them, those that the stages ran with."""
    found = evidence.json_tag("params")
    try:
        committed = plain(YAML().load(evidence.committed(str(PARAMS_FILE)).decode()))
    except (YAMLError, ValueError) as error:
        raise Missing(f"{PARAMS_FILE} of the commit cannot be read ({type(error).__name__})") from None
    for where, expected in (
        (bundle.EXPERIMENT, evidence.experiment.params),
        (f"{PARAMS_FILE} of the commit", committed),
    ):
        for key in differing(found, expected):
            raise Missing(f"param {key} is not the same in tag params and in {where}")
    for key, value in evidence.lock.params.items():
        same(f"param {key}", at(found, key), value, f"{LOCK} of the commit")


def differing(one: Any, other: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values differ."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield prefix or "(all)"
        return
    for key in sorted(one.keys() | other.keys(), key=str):
        yield from differing(one.get(key), other.get(key), f"{prefix}.{key}" if prefix else str(key))


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def metrics(evidence: Evidence) -> None:
    """Those in the file that dvc.lock names."""
    found, content = evidence.json_tag("metrics"), evidence.file(METRICS_FILE).read_bytes()
    if not found:
        raise Missing("tag metrics is empty")
    same(
        f"MD5 of {METRICS_FILE}",
        md5(content),
        evidence.lock.outs.get(str(files.METRICS)),
        f"{LOCK} of the commit",
    )
    for where, expected in (
        (METRICS_FILE, json.loads(content)),
        (bundle.EXPERIMENT, evidence.experiment.metrics),
    ):
        for key in differing(found, expected):
            raise Missing(f"metric {key} is not the same in tag metrics and in {where}")


def model(evidence: Evidence) -> None:
    path = evidence.file(f"bundle/{bundle.MODEL}")
    same("sha256 of bundle/model.onnx", files.sha256(path), evidence.tag("model_sha256"), "tag model_sha256")
    same("model_sha256", evidence.tag("model_sha256"), evidence.experiment.model.sha256, bundle.EXPERIMENT)
    outs = evidence.lock.outs
    same(
        "MD5 of bundle/model.onnx", files.md5(path), outs.get(str(files.MODEL_ONNX)), f"{LOCK} of the commit"
    )


def bundled(evidence: Evidence) -> None:
    experiment, found = evidence.experiment, files.sha256(evidence.file(f"bundle/{bundle.EXPERIMENT}"))
    same(f"sha256 of bundle/{bundle.EXPERIMENT}", found, evidence.tag("experiment_sha256"), "its tag")
    for name, expected in ((bundle.MODEL, experiment.model), (bundle.GOLDEN, experiment.golden)):
        path = evidence.file(f"bundle/{name}")
        same(f"size of bundle/{name}", path.stat().st_size, expected.size, bundle.EXPERIMENT)
        same(f"sha256 of bundle/{name}", files.sha256(path), expected.sha256, bundle.EXPERIMENT)
    if str(files.GOLDEN) in evidence.lock.outs:
        found = files.md5(evidence.file(f"bundle/{bundle.GOLDEN}"))
        same(
            "MD5 of bundle/golden.npz",
            found,
            evidence.lock.outs[str(files.GOLDEN)],
            f"{LOCK} of the commit",
        )


def artifacts(evidence: Evidence) -> None:
    """The MLflow model and every other file, as they were registered."""
    same(
        f"sha256 of {MANIFEST}",
        files.sha256(evidence.file(MANIFEST)),
        evidence.tag("manifest_sha256"),
        "its tag",
    )
    expected = json.loads(evidence.file(MANIFEST).read_bytes())
    for name in differing(manifest(evidence.folder), expected):
        raise Missing(f"{name} is not the file that was registered, or was not registered")
    if "MLmodel" not in expected:
        raise Missing("MLmodel is missing from its artifacts")


def release(evidence: Evidence) -> None:
    """The bundle is of this release; the git tag, where it has been fetched, names this commit and these bytes."""
    tag = evidence.tag("model_tag")
    same("tag model_tag", tag, evidence.experiment.tag, bundle.EXPERIMENT)
    try:
        tagged = git.resolve(f"refs/tags/{tag}")
    except git.UnknownRevision:
        return
    same("git_commit", evidence.tag("git_commit"), tagged, f"git tag {tag}")
    message = git.ask("for-each-ref", "--format=%(contents)", f"refs/tags/{tag}")
    trailers = dict(re.findall(r"(?m)^([A-Z][\w-]+): (\S+)$", message))
    for trailer, key in (
        ("Model-Sha256", "model_sha256"),
        ("Lock-Sha256", "lock_sha256"),
        ("Data-Hash", "data_hash"),
    ):
        if trailer in trailers:
            same(key, evidence.tag(key), trailers[trailer], f"git tag {tag}")
    for digest, name in SUM.findall(message):
        if name in BUNDLE_FILES:
            path = evidence.file(f"bundle/{name}")
            same(f"sha256 of bundle/{name}", files.sha256(path), digest, f"git tag {tag}")


def run(evidence: Evidence) -> None:
    """The run exists, trained these bytes, and has the params and metrics that the version has."""
    run_id = evidence.version.run_id
    if not run_id:
        raise Missing("the version names no run")
    found = evidence.registry.run(run_id)
    same(
        "model_sha256 of the run",
        found.data.tags.get("model_sha256"),
        evidence.tag("model_sha256"),
        "the version",
    )
    same("status of the run", found.info.status, "FINISHED", "a whole trace")
    for key, value in texts(evidence.json_tag("params")).items():
        same(f"param {key} of the run", found.data.params.get(key), value, "the version")
    for name, number in numbers(evidence.json_tag("metrics")).items():
        same(f"metric {name} of the run", found.data.metrics.get(name), number, "the version")


def comment(evidence: Evidence) -> None:
    """A link to the comment that was reviewed; asked for at GitLab where there is a token for it."""
    url = evidence.tag("comment_url")
    match = NOTE.fullmatch(url) or COMMIT_NOTE.fullmatch(url)
    if match is None:
        raise Missing(f"comment_url is {shorten(url)}, which links to no merge request or commit")
    project = evidence.settings.ci_project_url
    if project is not None and not url.startswith(f"{project}/-/"):
        raise Missing(f"comment_url is {shorten(url)}, which is not in this project ({project})")
    merge_request = evidence.version.tags.get("merge_request_url")
    if merge_request is not None and url.partition("#")[0] != merge_request and NOTE.fullmatch(url):
        raise Missing(f"comment_url is {shorten(url)}, but the merge request is {shorten(merge_request)}")
    if exists(url, match, evidence.settings) is False:
        raise Missing(f"GitLab knows no such comment: {shorten(url)}")


def exists(url: str, match: re.Match[str], settings: Settings) -> bool | None:
    """None where GitLab cannot be asked: no token, another host, no answer, or no right to see it.

    GitLab may lie below a path of its host, which is no part of the project's.
    """
    token, api = settings.comment_token, settings.api_url
    base = f"{(api or '').removesuffix('/api/v4')}/"
    if token is None or api is None or not url.startswith(base):
        return None
    import requests

    kind = "merge_requests" if NOTE.fullmatch(url) else "repository/commits"
    address = f"{api}/projects/{quote(match[1].removeprefix(base), safe='')}/{kind}/{match[2]}"
    if kind == "merge_requests" and match[3] is not None:
        address += f"/notes/{match[3]}"
    headers = {"PRIVATE-TOKEN": token.get_secret_value()}
    # the runner names a file for public authorities as well, and that one need not have the root
    own = settings.ci_server_tls_ca_file
    tries: list[bool | str] = [True, str(own)] if own else [True]
    for trusted in tries:
        try:
            answer = requests.get(address, headers=headers, timeout=20, verify=trusted)
        except requests.exceptions.SSLError:
            continue
        except requests.RequestException:
            return None
        return False if answer.status_code == 404 else True if answer.ok else None
    return None


def gate(evidence: Evidence) -> None:
    if evidence.tag("gate") not in GATES:
        raise Missing(
            f"gate is {shorten(evidence.tag('gate'))}; what may be promoted has: {', '.join(GATES)}"
        )


PIECES: dict[str, Callable[[Evidence], None]] = {
    "trail": trail,
    "code": code,
    "lock": lock,
    "data": data,
    "params": params,
    "metrics": metrics,
    "model": model,
    "bundle": bundled,
    "artifacts": artifacts,
    "release": release,
    "run": run,
    "comment": comment,
    "gate": gate,
}
