"""The three stores: a folder, git tags with a DVC remote, an MLflow registry. Real git, DVC and MLflow."""

import contextlib
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from ruamel.yaml import YAML

from ml import files
from ml.serve.model import Refused, check_bundle
from ml.serve.settings import ServeSettings
from ml.serve.state import State
from ml.serve.store.base import Listing, NotFound, Unavailable, open_store
from ml.serve.store.directory import DirectoryStore
from tests.experiment import PIPELINE, Experiment, make_experiment, predictions
from tests.mlflow_server import mlflow_server
from tests.serving import DIGITS, SIZE, make_images, png, served, write_experiment

pytest_plugins = ["tests.serving_fixtures"]
LIMIT = 2**20


def fetch(store: Any, tag: str, folder: Path, limit: int = LIMIT) -> Path:
    folder.mkdir()
    store.fetch(tag, folder, limit)
    return folder


# A folder


def test_folder_lists_what_is_whole_and_names_what_is_not(bundles: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(bundles, tmp_path / "models"))
    (models / "broken").mkdir()
    (models / "broken" / "experiment.json").write_text("{}")
    (models / "empty").mkdir()
    (models / "not a tag").mkdir()
    (models / "file").write_text("")
    (models / "link").symlink_to(models / "model-v1.0.0", target_is_directory=True)
    listing = DirectoryStore(models).listing()
    assert [each.tag for each in listing.experiments] == ["model-v1.0.0", "model-v1.1.0"]
    assert set(listing.unreadable) == {"broken", "empty"}


def test_folder_sees_a_model_that_was_added_or_rewritten_since(bundles: Path, tmp_path: Path) -> None:
    models = Path(shutil.copytree(bundles, tmp_path / "models"))
    store = DirectoryStore(models)
    assert store.newest() == "model-v1.1.0"
    shutil.copytree(models / "model-v1.0.0", models / "model-v2")
    write_experiment(models / "model-v2", created="2026-03-01T00:00:00Z")
    write_experiment(models / "model-v1.0.0", metrics={"accuracy": 0.1})
    assert store.newest() == "model-v2"
    assert {each.tag: each.metrics for each in store.listing().experiments}["model-v1.0.0"] == {
        "accuracy": 0.1
    }


def test_folder_gives_a_model_or_says_why_not(bundles: Path, tmp_path: Path) -> None:
    store = DirectoryStore(bundles)
    check_bundle(fetch(store, "model-v1.0.0", tmp_path / "whole"), LIMIT, "model-v1.0.0")
    with pytest.raises(NotFound):
        fetch(store, "model-v9", tmp_path / "missing")
    with pytest.raises(Refused):
        fetch(store, "model-v1.0.0", tmp_path / "long", limit=100)
    assert not list((tmp_path / "long").glob("model.onnx"))
    with pytest.raises(NotFound):
        DirectoryStore(tmp_path / "missing").newest()
    with pytest.raises(Unavailable):
        DirectoryStore(tmp_path / "nothing").listing()


# Git tags and a DVC remote


def bomb() -> str:
    """Fourteen lines of YAML that stand for 10^14 numbers."""
    names = "abcdefghijklmn"
    return "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip(names, names[1:])
    )


def make_release(experiment: Experiment, bundle: Path, tag: str, **trailers: str) -> str:
    """The bundle's model as outputs of a pipeline, committed, pushed to the DVC remote, tagged."""
    experiment.write_results(predictions(count=30))
    shutil.copy(bundle / "model.onnx", experiment.folder / files.MODEL_ONNX)
    shutil.copy(bundle / "golden.npz", experiment.folder / files.GOLDEN)
    summary = {"dataset": "bars", "class_names": DIGITS, "image_height": SIZE, "image_width": SIZE}
    experiment.write(str(files.DATA_SUMMARY), json.dumps(summary))
    experiment.write(str(files.METRICS), json.dumps({"accuracy": {"mean": 0.9}}))
    commit = experiment.commit(tag)
    experiment.push()
    found = {
        "Model-Sha256": files.sha256(bundle / "model.onnx"),
        "Lock-Sha256": files.sha256(experiment.folder / "dvc.lock"),
    } | {name.replace("_", "-"): value for name, value in trailers.items()}
    message = f"Release {tag}\n\n" + "\n".join(f"{name}: {value}" for name, value in found.items())
    experiment.git("tag", "--annotate", "--message", message, tag)
    return commit


@pytest.fixture(scope="module")
def project(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two releases, a tag of another kind, one that is no release, and one whose dvc.lock was exchanged."""
    experiment = make_experiment(tmp_path_factory.mktemp("git") / "project")
    pipeline = json.loads(json.dumps(PIPELINE))
    pipeline["stages"]["train"]["outs"].append(str(files.GOLDEN))
    with open(experiment.folder / "dvc.yaml", "w") as file:
        YAML().dump(pipeline, file)
    with contextlib.chdir(experiment.folder):  # DVC takes relative paths from there
        experiment.write_results(predictions(count=30))
        experiment.write(str(files.GOLDEN), "none yet")
        experiment.commit("begin")
        experiment.add_remote()
        make_release(experiment, bundles / "model-v1.0.0", "model-v1.0.0")
        make_release(experiment, bundles / "model-v1.1.0", "model-v1.1.0")
        make_release(experiment, bundles / "model-v1.1.0", "model-v1.2.0", Lock_Sha256="0" * 64)
        experiment.git("tag", "v9")
        experiment.git("rm", "--quiet", "--cached", "dvc.lock")
        experiment.git("commit", "--quiet", "--message", "no results")
        experiment.git("tag", "model-v0-none")
    return experiment


def git_store(where: str, cache: Path, **settings: Any) -> Any:
    return open_store(ServeSettings(model_store=f"git+{where}", **settings), cache)


@pytest.mark.parametrize("kind", ["path", "address", "bare"])
def test_git_store_lists_releases_and_gives_their_models(
    project: Experiment, bundles: Path, tmp_path: Path, kind: str
) -> None:
    where, more = str(project.folder), {}
    if kind != "path":
        more = {"dvc_remote_url": f"{project.folder}-remote"}
    if kind == "address":
        where = f"file://{where}"
    if kind == "bare":
        where = str(tmp_path / "bare.git")
        subprocess.run(["git", "clone", "--quiet", "--bare", str(project.folder), where], check=True)
    store = git_store(where, tmp_path / "cache", **more)
    listing = store.listing()
    assert {each.tag for each in listing.experiments} == {"model-v1.0.0", "model-v1.1.0"}
    assert set(listing.unreadable) == {"model-v1.2.0", "model-v0-none"}
    one = next(each for each in listing.experiments if each.tag == "model-v1.0.0")
    assert one.git_commit == project.git("rev-parse", "model-v1.0.0^{commit}")
    assert one.metrics == {"accuracy": {"mean": 0.9}} and one.dataset == "bars" and "train" in one.params
    folder = fetch(store, "model-v1.0.0", tmp_path / "fetched")
    bundle = check_bundle(folder, LIMIT, "model-v1.0.0")
    assert bundle.experiment == one
    assert (folder / "model.onnx").read_bytes() == (bundles / "model-v1.0.0" / "model.onnx").read_bytes()


def test_git_store_refuses_what_is_no_release_or_was_tampered_with(
    project: Experiment, bundles: Path, tmp_path: Path
) -> None:
    store = git_store(str(project.folder), tmp_path / "cache")
    for tag, error in (
        ("v9", NotFound),
        ("model-v7", NotFound),
        ("model-v1.2.0", Refused),
        ("model-v0-none", Refused),
    ):
        with pytest.raises(error):
            fetch(store, tag, tmp_path / f"fetched-{tag}")
    remote = Path(shutil.copytree(f"{project.folder}-remote", tmp_path / "remote"))
    md5 = files.md5(bundles / "model-v1.0.0" / "model.onnx")
    (found,) = remote.rglob(md5[2:])
    found.chmod(0o644)
    content = found.read_bytes()
    store = git_store(str(project.folder), tmp_path / "other-cache", dvc_remote_url=str(remote))
    found.write_bytes(content[:-1] + b"?")
    with pytest.raises(Refused) as caught:
        fetch(store, "model-v1.0.0", tmp_path / "tampered")
    assert caught.value.check == "sha256"
    found.unlink()
    with pytest.raises(NotFound):
        fetch(store, "model-v1.0.0", tmp_path / "gone")
    assert not list((tmp_path / "other-cache" / "objects").glob(f"*{md5}*"))


def test_git_store_that_cannot_be_reached_is_unavailable(tmp_path: Path) -> None:
    for where in (f"file://{tmp_path}/none", str(tmp_path / "none")):
        with pytest.raises(Unavailable):
            git_store(where, tmp_path / "cache").listing()


def test_server_follows_new_tags_of_a_repository(project: Experiment, bundles: Path, tmp_path: Path) -> None:
    remote = f"{project.folder}-remote"
    with served(f"git+{project.folder}", tmp_path, DVC_REMOTE_URL=remote, MODEL_TAG="model-v1.0.0") as server:
        answer = server.swap("model-v1.1.0")
        assert answer.status_code == 200, answer.text
        assert server.post("/predict", data=png(make_images(4)[3])).json()["model"] == "model-v1.1.0"
        assert server.swap("model-v1.2.0").json()["check"] == "sha256"
        assert server.get("/get_experiments_metas").json()["total"] == 2


@pytest.mark.parametrize(
    "path, content, check",
    [
        ("params.yaml", "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + bomb(), "files"),
        ("params.yaml", "a: &a [*a]\n", "files"),
        ("params.yaml", "#" * 2**20 + "\na: 1\n", "size"),
        ("params.yaml", "[1, 2]\n", "files"),
    ],
)
def test_git_store_names_a_hostile_release_and_lists_the_others(
    project: Experiment, tmp_path: Path, path: str, content: str, check: str
) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(project.folder), str(clone)], check=True)
    (clone / path).write_text(content)
    git = ["git", "-C", str(clone), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "checkout", "--quiet", "model-v1.1.0", "--", "dvc.lock"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--all", "--message", "hostile"], check=True)
    subprocess.run([*git, "tag", "model-v6"], check=True)
    store = git_store(str(clone), tmp_path / "cache", dvc_remote_url=f"{project.folder}-remote")
    started = time.monotonic()
    listing = store.listing()
    assert time.monotonic() - started < 20
    assert {each.tag for each in listing.experiments} == {"model-v1.0.0", "model-v1.1.0"}
    assert "model-v6" in listing.unreadable
    with pytest.raises(Refused) as caught:
        fetch(store, "model-v6", tmp_path / "fetched")
    assert caught.value.check == check


# An MLflow registry


class Hostile(BaseHTTPRequestHandler):
    """A server that claims to be MLflow: the first part of the address says what it answers to everything."""

    answers = {
        "text": b"hello",
        "list": b"[]",
        "torn": b'{"model_versions": [{"name"',
        "deep": b"[" * 100_000,
        "shapes": b'{"model_versions": [{"name": "ml", "tags": 7}], "registered_model": {"aliases": [3]}}',
        "no-version": b'{"model_versions": [{"name": "ml"}], "registered_model": {"aliases": [{"alias": "champion"}]}}',
        "endless": b'{"model_versions": [], "next_page_token": "more"}',
        "huge": b'{"model_versions": "' + b"x" * 2**24 + b'"}',
    }

    def do_GET(self) -> None:
        body = self.answers[self.path.split("/")[1]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_registry_that_answers_nonsense_is_unavailable_and_never_a_fault(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for kind in Hostile.answers:
            address = f"mlflow+http://127.0.0.1:{server.server_port}/{kind}"
            store = open_store(ServeSettings(model_store=address), tmp_path)
            (tmp_path / kind).mkdir()
            for ask in (store.listing, store.newest, lambda: store.fetch("model-v1", tmp_path / kind, LIMIT)):
                try:
                    assert ask() == Listing([], {}, {})
                except (Unavailable, NotFound, Refused):
                    pass
        server.shutdown()


@pytest.fixture(scope="module")
def registry(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server with two versions of the model `ml`, as ml.tracking.registry writes them."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(folder) as address:
        register(address, bundles)
        yield address


def register(address: str, bundles: Path) -> None:
    def post(route: str, **body: Any) -> Any:
        answer = requests.post(f"{address}/api/2.0/mlflow/{route}", json=body, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    experiment = post("experiments/create", name="serving")["experiment_id"]
    post("registered-models/create", name="ml")
    for number, tag in enumerate(("model-v1.0.0", "model-v1.1.0"), 1):
        run = post("runs/create", experiment_id=experiment)["run"]["info"]
        root = f"{run['artifact_uri']}/registered/{tag}"
        path = root.removeprefix("mlflow-artifacts:/").lstrip("/")
        for name in ("model.onnx", "golden.npz", "experiment.json"):
            url = f"{address}/api/2.0/mlflow-artifacts/artifacts/{path}/bundle/{name}"
            assert requests.put(url, data=(bundles / tag / name).read_bytes(), timeout=30).status_code == 200
        tags = {"model_tag": tag, "experiment_sha256": files.sha256(bundles / tag / "experiment.json")}
        pairs = [{"key": key, "value": value} for key, value in tags.items()]
        post("model-versions/create", name="ml", source=root, run_id=run["run_id"], tags=pairs)
        if number == 1:
            requests.post(
                f"{address}/api/2.0/mlflow/registered-models/alias",
                json={"name": "ml", "alias": "champion", "version": "1"},
                timeout=30,
            ).raise_for_status()
    post(
        "model-versions/create",
        name="ml",
        source=root.replace("v1.1.0", "none"),
        run_id=run["run_id"],
        tags=[],
    )


@pytest.mark.slow
def test_registry_lists_versions_with_aliases_and_gives_their_models(
    registry: str, bundles: Path, tmp_path: Path
) -> None:
    store = open_store(ServeSettings(model_store=f"mlflow+{registry}"), tmp_path)
    listing = store.listing()
    assert {each.tag for each in listing.experiments} == {"model-v1.0.0", "model-v1.1.0"}
    assert listing.aliases == {"model-v1.0.0": ["champion"]} and set(listing.unreadable) == {"version 3"}
    assert store.newest() == "model-v1.0.0"
    check_bundle(fetch(store, "model-v1.1.0", tmp_path / "one"), LIMIT, "model-v1.1.0")
    bundle, _ = State(tmp_path / "state", LIMIT).install(store, "champion")
    assert bundle.experiment.tag == "model-v1.0.0"
    with pytest.raises(NotFound):
        fetch(store, "model-v9", tmp_path / "none")
    with pytest.raises(Refused):
        fetch(store, "model-v1.1.0", tmp_path / "long", limit=100)
    with pytest.raises(NotFound):
        open_store(ServeSettings(model_store=f"mlflow+{registry}?model=other"), tmp_path).listing()
    with pytest.raises(Unavailable):
        open_store(ServeSettings(model_store="mlflow+http://127.0.0.1:9"), tmp_path).listing()


@pytest.mark.slow
def test_server_begins_with_the_champion_and_takes_others_by_tag_or_alias(
    registry: str, tmp_path: Path
) -> None:
    with served(f"mlflow+{registry}", tmp_path) as server:
        assert server.get("/ready").json()["model"] == "model-v1.0.0"
        assert server.swap("model-v1.1.0").json()["tag"] == "model-v1.1.0"
        assert server.swap("champion").json()["tag"] == "model-v1.0.0"
        document = server.get("/get_experiments_metas?sort=tag").json()
        assert [each["aliases"] for each in document["experiments"]] == [["champion"], []]
        assert document["unreadable"][0]["tag"] == "version 3"
