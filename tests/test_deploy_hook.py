"""The deploy hook against the real server: deploy, smoke test, record, and back again when it fails."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ml import files
from ml.errors import UserError
from ml.release import deploy
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.protection import TagRule
from tests.gitlab_emulator.rights import MAINTAINER
from tests.release_project import job
from tests.serving import TOKEN, Served, served

pytest_plugins = ["tests.serving_fixtures"]

OLD = "registry.test/g/proj@sha256:" + "1" * 64
NEW = "registry.test/g/proj@sha256:" + "2" * 64
WRITE = 'echo "$MODEL_TAG $IMAGE" >> deployed'


@pytest.fixture
def folder(bundles: Path, tmp_path: Path) -> Path:
    """The deploy job's checkout: the bundles lie in models/, as the release job leaves them."""
    shutil.copytree(bundles, tmp_path / "models")
    return tmp_path


@pytest.fixture(scope="module")
def shared_server(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(bundles, tmp_path_factory.mktemp("served"), MODEL_TAG="model-v1.0.0") as found:
        yield found


@pytest.fixture
def server(shared_server: Served) -> Served:
    assert shared_server.swap("model-v1.0.0").status_code == 200
    return shared_server


@pytest.fixture
def gitlab() -> Iterator[GitLabEmulator]:
    """With a release for each of the two bundles."""
    with GitLabEmulator() as emulator:
        for tag in ("model-v1.0.0", "model-v1.1.0"):
            emulator.project.releases[tag] = {"tag_name": tag, "assets": {"count": 0, "links": []}}
        yield emulator


def run(folder: Path, *arguments: str, fails: str = "", **environment: str) -> str:
    own = {"MODEL_TAG": "model-v1.1.0", "IMAGE": NEW, "DEPLOY_TIMEOUT": "3", **environment}
    with job(folder, own) as said:
        if fails:
            with pytest.raises(UserError, match=fails) as caught:
                deploy.main(list(arguments))
            return f"{said.getvalue()}{caught.value}"
        deploy.main(list(arguments))
    return said.getvalue()


def swap(server: Served) -> dict[str, str]:
    return {"SERVE_URL": server.address, "SERVE_TOKEN": TOKEN}


def live(server: Served) -> str:
    return str(server.get("/get_experiments_metas").json()["live"])


def change_golden(folder: Path, off: float) -> None:
    """The release says that the model gives something else."""
    path = folder / "models/model-v1.1.0/golden.npz"
    golden = files.load_golden(path)
    probabilities = golden.probabilities.copy()
    probabilities[0, 0] += np.float32(off)
    files.save_arrays(path, images=golden.images, probabilities=probabilities)
    described = path.with_name("experiment.json")
    content = json.loads(described.read_text())
    content["golden"] = {"sha256": files.sha256(path), "size": path.stat().st_size}
    described.write_text(json.dumps(content))


# ---- The running server swaps


def test_running_server_swaps_and_answers_the_golden_images(folder: Path, server: Served) -> None:
    said = run(folder, **swap(server))
    assert live(server) == "model-v1.1.0" and "answers the golden images as it should" in said
    assert "swapped to model-v1.1.0" in run(folder, **swap(server))  # again: no harm


def test_wrong_answers_bring_the_model_before_back(folder: Path, server: Served) -> None:
    change_golden(folder, 0.001)
    message = run(folder, **swap(server), fails="answers the golden images otherwise")
    assert "Rolled back to model-v1.0.0" in message and live(server) == "model-v1.0.0"


def test_answers_within_the_tolerance_pass(folder: Path, server: Served) -> None:
    change_golden(folder, 0.00005)
    said = run(folder, **swap(server))
    assert "swapped to model-v1.1.0" in said and live(server) == "model-v1.1.0"


def test_refused_swap_leaves_the_server_and_names_the_variable(folder: Path, server: Served) -> None:
    message = run(
        folder, SERVE_URL=server.address, SERVE_TOKEN="another-token", fails="SERVE_TOKEN has to be"
    )
    assert live(server) == "model-v1.0.0" and "another-token" not in message


def test_model_that_the_servers_store_lacks_is_named(folder: Path, server: Served) -> None:
    shutil.copytree(folder / "models/model-v1.1.0", folder / "models/model-v9.0.0")
    content = json.loads((folder / "models/model-v9.0.0/experiment.json").read_text())
    (folder / "models/model-v9.0.0/experiment.json").write_text(json.dumps(content | {"tag": "model-v9.0.0"}))
    run(folder, **swap(server), MODEL_TAG="model-v9.0.0", fails="did not take model-v9.0.0: 404")
    assert live(server) == "model-v1.0.0"


def test_smoke_test_alone_deploys_nothing(folder: Path, server: Served) -> None:
    run(folder, "--smoke-only", SERVE_URL=server.address, fails="serves 'model-v1.0.0'")
    assert live(server) == "model-v1.0.0"
    run(folder, "--smoke-only", SERVE_URL=server.address, MODEL_TAG="model-v1.0.0")


# ---- The team's own command or hook


def test_command_gets_tag_and_image_by_digest(folder: Path) -> None:
    said = run(folder, DEPLOY_COMMAND=WRITE)
    assert (folder / "deployed").read_text() == f"model-v1.1.0 {NEW}\n"
    assert "SERVE_URL is not set: not tested" in said


def test_image_that_passed_is_noted_and_gone_back_to(folder: Path, gitlab: GitLabEmulator) -> None:
    job_of = gitlab.environment(None)
    run(folder, **job_of, DEPLOY_COMMAND=WRITE, MODEL_TAG="model-v1.0.0", IMAGE=OLD)
    failing = f'{WRITE}; [ "$MODEL_TAG" = model-v1.0.0 ]'
    message = run(folder, **job_of, DEPLOY_COMMAND=failing, fails="ended with exit code 1")
    assert f"Rolled back to model-v1.0.0 {OLD}" in message
    assert (folder / "deployed").read_text().splitlines() == [
        f"model-v1.0.0 {OLD}",
        f"model-v1.1.0 {NEW}",
        f"model-v1.0.0 {OLD}",
    ]
    links = {tag: release["assets"]["links"] for tag, release in gitlab.project.releases.items()}
    assert [link["url"] for link in links["model-v1.0.0"]] == [f"https://{OLD}"]
    assert links["model-v1.1.0"] == []  # never noted: it failed


def test_link_that_no_deployment_has_made_is_not_gone_back_to(folder: Path, gitlab: GitLabEmulator) -> None:
    gitlab.project.releases["model-v1.0.0"]["assets"]["links"].append(
        {"id": 1, "name": "image", "url": "https://elsewhere.example.com/miner:latest", "link_type": "image"}
    )
    message = run(folder, **gitlab.environment(None), DEPLOY_COMMAND=f"{WRITE}; false", fails="exit code 1")
    assert "elsewhere" not in message + (folder / "deployed").read_text()


@pytest.mark.parametrize("image", ["registry.example.com/g/p:latest", f"{OLD}\n", f" {OLD}"])
def test_image_to_go_back_to_that_is_none_by_digest_is_refused_before_anything_is_deployed(
    folder: Path, image: str
) -> None:
    run(
        folder,
        DEPLOY_COMMAND=WRITE,
        PREVIOUS_MODEL_TAG="model-v1.0.0",
        PREVIOUS_IMAGE=image,
        fails="PREVIOUS_IMAGE",
    )
    assert not (folder / "deployed").exists()


def test_deploying_again_leaves_one_note(folder: Path, gitlab: GitLabEmulator) -> None:
    for _ in range(2):
        run(folder, **gitlab.environment(None), DEPLOY_COMMAND=WRITE)
    assert len(gitlab.project.releases["model-v1.1.0"]["assets"]["links"]) == 1


def test_server_that_stays_on_the_old_model_is_a_failed_deployment(folder: Path, server: Served) -> None:
    message = run(
        folder,
        DEPLOY_COMMAND=WRITE,
        SERVE_URL=server.address,
        PREVIOUS_MODEL_TAG="model-v1.0.0",
        PREVIOUS_IMAGE=OLD,
        fails="does not serve model-v1.1.0 after 3 s",
    )
    assert f"Rolled back to model-v1.0.0 {OLD}" in message
    assert (folder / "deployed").read_text().splitlines()[-1] == f"model-v1.0.0 {OLD}"


def test_first_deployment_that_fails_says_that_there_is_nothing_before(folder: Path) -> None:
    assert "no earlier release" in run(folder, DEPLOY_COMMAND="exit 3", fails="exit code 3")


def test_previous_release_without_an_image_is_not_guessed(folder: Path) -> None:
    environment = {"DEPLOY_COMMAND": "exit 3", "PREVIOUS_MODEL_TAG": "model-v1.0.0"}
    assert "has no image on record" in run(folder, **environment, fails="exit code 3")


@pytest.fixture
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A web hook that takes token `hooks-own`, and what it got."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if self.headers["Authorization"] == "Bearer hooks-own" else 401)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/deploy", got
        listening.shutdown()
        thread.join()


def test_web_hook_gets_the_same_with_its_token(folder: Path, hook: tuple[str, list[dict[str, Any]]]) -> None:
    url, got = hook
    run(folder, DEPLOY_WEBHOOK=url, DEPLOY_WEBHOOK_TOKEN="hooks-own")
    digest = files.sha256(folder / "models/model-v1.1.0/model.onnx")
    assert got == [{"model_tag": "model-v1.1.0", "model_sha256": digest, "image": NEW}]
    run(folder, DEPLOY_WEBHOOK=url, fails="DEPLOY_WEBHOOK answered 401")


# ---- Nothing to do, and nonsense


def test_nothing_released_or_nothing_configured_is_said(folder: Path) -> None:
    assert "no model was released" in run(folder, MODEL_TAG="", DEPLOY_COMMAND=WRITE)
    assert "nothing was deployed" in run(folder)
    assert not (folder / "deployed").exists()


def test_bundle_of_another_model_is_not_deployed(folder: Path) -> None:
    run(folder, DEPLOY_COMMAND=WRITE, MODEL_SHA256="0" * 64, fails="Nothing was deployed")
    run(folder, DEPLOY_COMMAND=WRITE, MODEL_TAG="model-v3.0.0", fails="experiment.json is missing")
    run(folder, DEPLOY_COMMAND=WRITE, IMAGE="registry.test/g/proj:latest", fails="IMAGE")
    assert not (folder / "deployed").exists()


# ---- Who may note the image


def test_job_token_that_may_not_note_the_image_costs_no_deployment(
    folder: Path, gitlab: GitLabEmulator
) -> None:
    """Tags are protected, and a Developer has merged."""
    gitlab.project.protected_tags["model-v*"] = TagRule()
    said = run(folder, **gitlab.environment(None), DEPLOY_COMMAND=WRITE)
    assert (folder / "deployed").read_text() == f"model-v1.1.0 {NEW}\n"
    assert "warning: Noting the image in the release of model-v1.1.0: GitLab answered 403" in said
    assert "set RELEASE_TOKEN with the environment scope production" in said
    assert gitlab.project.releases["model-v1.1.0"]["assets"]["links"] == []


def test_release_token_notes_the_image_where_tags_are_protected(folder: Path, gitlab: GitLabEmulator) -> None:
    gitlab.project.protected_tags["model-v*"] = TagRule()
    token = gitlab.state.add_token(gitlab.project, "api", MAINTAINER).value
    said = run(folder, **gitlab.environment(None), RELEASE_TOKEN=token, DEPLOY_COMMAND=WRITE)
    assert "warning" not in said
    [link] = gitlab.project.releases["model-v1.1.0"]["assets"]["links"]
    assert link["url"] == f"https://{NEW}"
