"""The serving image, built from the Dockerfile and run: what is in it, what is not, and what it refuses."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import containers
from tests.containers import ROOT, container, in_image, inspect
from tests.serving import TOKEN, make_bundle, make_images, png, write_experiment

TAG, OTHER = "model-v1.2.0", "model-v1.3.0"
COMMIT = "89abcdef" * 5
NAME = "localhost/ml-test-serve"
MEGABYTES = 300  # above the base
pytestmark = pytest.mark.slow


def make_context(folder: Path) -> Path:
    """What the build is given: the repository's files, and two bundles in models/."""
    for path in ("Dockerfile", ".dockerignore", "constraints.txt", "pyproject.toml", "LICENSE", "README.md"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignore)
    shutil.copytree(ROOT / "deploy" / "image", folder / "deploy" / "image", ignore=ignore)
    (folder / "secret.txt").write_text("not for the image")
    make_bundle(folder / "models", TAG)
    shutil.copytree(folder / "models" / TAG, folder / "models" / OTHER)
    write_experiment(folder / "models" / OTHER)
    return folder


def experiment(context: Path, tag: str = TAG) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((context / "models" / tag / "experiment.json").read_text())
    return found


def arguments(context: Path) -> dict[str, str]:
    described = experiment(context)
    return {
        "MODEL_TAG": TAG,
        "MODEL_SHA256": described["model"]["sha256"],
        "DATA_HASH": described["data_hash"],
        "REVISION": COMMIT,
        "CREATED": "2026-01-02T03:04:05Z",
    }


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    containers.need_containers()
    return make_context(tmp_path_factory.mktemp("context") / "repository")


@pytest.fixture(scope="module")
def image(context: Path) -> str:
    containers.base_image()
    return containers.build(context, "serve", NAME, **arguments(context))


def digit() -> dict[str, Any]:
    return {"file": ("digit.png", png(make_images(1)[0]), "image/png")}


def test_image_serves_read_only_and_without_root_and_swaps_models(image: str, context: Path) -> None:
    mount = f"{context / 'models'}:/models:ro"
    with container(image, "--volume", mount, SERVE_TOKEN=TOKEN, MODEL_STORE="/models") as served:
        served.wait_until_ready()
        answer = requests.post(f"{served.address}/predict", files=digit(), timeout=10).json()
        assert answer["model"] == TAG and len(answer["predictions"][0]["probabilities"]) == 10
        assert requests.get(f"{served.address}/health", timeout=5).status_code == 200
        assert f'tag="{TAG}"' in requests.get(f"{served.address}/metrics", timeout=5).text
        page = requests.get(served.address, timeout=5)
        assert "<canvas" in page.text and "default-src 'none'" in page.headers["content-security-policy"]
        assert "<html" in requests.get(f"{served.address}/docs", timeout=5).text
        assert "/predict" in requests.get(f"{served.address}/openapi.json", timeout=5).json()["paths"]

        who = served.exec("id", "-u").stdout.strip()
        assert who == "10001"
        assert served.exec("python", "/app/healthcheck.py").returncode == 0
        assert "Read-only file system" in served.exec("touch", "/app/x").stderr

        request = {"json": {"tag": OTHER}, "headers": {"Authorization": f"Bearer {TOKEN}"}}
        swapped = requests.post(f"{served.address}/replace_ml_model", timeout=30, **request)
        assert swapped.status_code == 200, swapped.text
        assert requests.post(f"{served.address}/predict", files=digit(), timeout=10).json()["model"] == OTHER


def test_image_answers_with_the_model_that_is_baked_in(image: str) -> None:
    with container(image) as served:
        served.wait_until_ready()
        assert requests.post(f"{served.address}/predict", files=digit(), timeout=10).json()["model"] == TAG
        request = {"json": {"tag": TAG}, "headers": {"Authorization": "Bearer guess"}}
        assert requests.post(f"{served.address}/replace_ml_model", timeout=10, **request).status_code == 403
    assert in_image(image, "python", "/app/healthcheck.py").returncode == 1  # nothing runs there


def test_image_refuses_to_start_when_one_byte_of_the_model_has_flipped(
    image: str, context: Path, tmp_path: Path
) -> None:
    content = bytearray((context / "models" / TAG / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    mount = f"{tmp_path / 'model.onnx'}:/app/models/{TAG}/model.onnx:ro"
    with container(image, "--volume", mount) as served:
        assert served.exit_code() == 1
        assert "sha256" in served.logs() and "Traceback" not in served.logs()


def test_image_says_in_its_labels_where_it_comes_from(image: str, context: Path) -> None:
    config = inspect(image)["Config"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.revision"] == COMMIT
    assert labels["org.opencontainers.image.version"] == labels["ml.model.tag"] == TAG
    assert labels["ml.model.sha256"] == experiment(context)["model"]["sha256"]
    assert labels["ml.data.hash"] == experiment(context)["data_hash"]
    assert labels["org.opencontainers.image.created"] == "2026-01-02T03:04:05Z"
    assert config["User"] == "10001:10001"
    assert inspect(image)["Healthcheck"]["Test"] == ["CMD", "python", "/app/healthcheck.py"]
    text = json.dumps(inspect(image)["Config"])
    assert "SSL_CERT" not in text and "PIP_" not in text  # nothing of the machine that built it


def test_image_holds_no_compiler_no_torch_no_pip_and_nothing_from_beside_the_sources(image: str) -> None:
    program = """
import importlib.util, json, os, shutil
print(json.dumps({
    "programs": [name for name in ("gcc", "cc", "g++", "clang", "make", "git") if shutil.which(name)],
    "modules": [name for name in ("torch", "mlflow", "pandas", "pip", "sympy", "dvc") if importlib.util.find_spec(name)],
    "app": sorted(os.listdir("/app")), "ml": sorted(os.listdir("/app/ml")), "models": os.listdir("/app/models"),
}))"""
    done = in_image(image, "python", "-c", program)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["programs"] == [] and found["modules"] == []
    assert set(found["app"]) == {"healthcheck.py", "ml", "ml.dist-info", "models"} and found["models"] == [
        TAG
    ]
    assert "stages" not in found["ml"] and "serve" in found["ml"]


def test_image_carries_a_bill_of_materials_of_exactly_what_is_installed(image: str, context: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonValidator

    text = in_image(image, "cat", "/sbom.cdx.json").stdout
    bom = json.loads(text)
    version = SchemaVersion[f"V{bom['specVersion'].replace('.', '_')}"]
    assert JsonValidator(version).validate_str(text) is None
    by_kind: dict[str, dict[str, str]] = {}
    for component in bom["components"]:
        kind = component.get("purl", component["type"]).split("/")[0]
        by_kind.setdefault(kind, {})[component["name"]] = component["version"]
    listing = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    installed = json.loads(in_image(image, "/opt/venv/bin/python", "-c", listing).stdout)
    del installed["ml"]  # copied, not installed
    assert by_kind["pkg:pypi"] == installed and "onnxruntime" in installed
    assert "libc6" in by_kind["pkg:deb"]
    (model,) = (each for each in bom["components"] if each["type"] == "machine-learning-model")
    assert model["hashes"] == [{"alg": "SHA-256", "content": experiment(context)["model"]["sha256"]}]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pinned = {normal(name): version for name, version in pins.items()}
    assert {name: pinned.get(normal(name)) for name in installed} == installed


def test_image_is_small(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    added = (inspect(image)["Size"] - inspect(containers.BASE)["Size"]) / 1e6
    with capsys.disabled():
        print(f"\n  serving image: {added:.0f} MB above its base")
    assert added <= MEGABYTES


@pytest.mark.parametrize("wrong", ("MODEL_SHA256", "DATA_HASH", "REVISION", "MODEL_TAG"))
def test_image_is_not_built_when_an_argument_is_not_the_bundles(
    image: str, context: Path, wrong: str
) -> None:
    """The script that the build runs, in the built image: it needs no second build."""
    script = ROOT / "deploy" / "image" / "check_bundle.py"
    given = arguments(context) | {wrong: "" if wrong in ("REVISION", "MODEL_TAG") else "0" * 64}
    volumes = [f"{script}:/check_bundle.py:ro", f"{context / 'models'}:/models:ro"]
    command = ["podman", "run", "--rm", "--network", "none", *containers.LIMITS, "--entrypoint", "python"]
    command += [word for volume in volumes for word in ("--volume", volume)]
    command += [word for name, value in given.items() for word in ("--env", f"{name}={value}")]
    done = subprocess.run([*command, image, "/check_bundle.py", "/models"], capture_output=True, text=True)
    assert done.returncode == 1 and wrong in done.stderr and "Traceback" not in done.stderr
