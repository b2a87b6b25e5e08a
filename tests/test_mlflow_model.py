"""The MLflow model, used as strangers use it: in an empty folder, in an environment that has no package `ml`."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from ruamel.yaml import YAML

from ml.files import Golden, load_golden
from ml.tracking.model import imported
from tests.ports import free_port
from tests.workspace import environment, make_workspace, run_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workspace(tmp_path_factory.mktemp("model") / "work", epochs=1, seeds=[0])
    for stage in ("load", "preprocess", "train"):
        done = run_stage(stage, folder)
        assert done.returncode == 0, done.stderr
    save = "from pathlib import Path; from ml.tracking.model import save_model; save_model(Path('../elsewhere/model'))"
    done = subprocess.run(
        [sys.executable, "-c", save], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def model(workspace: Path) -> Path:
    """The folder of the model, with nothing beside it."""
    return workspace.parent / "elsewhere" / "model"


@pytest.fixture(scope="module")
def expected(workspace: Path) -> Golden:
    return load_golden(workspace / "artifacts/golden.npz")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A new environment with the packages of this one, but without this repository; its Python, and its variables."""
    folder = tmp_path_factory.mktemp("stranger") / "venv"
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # A path in a .pth file is searched for modules, but the editable installation's own .pth file there is not run.
    (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    keep = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTHON", "MLFLOW", "VIRTUAL_ENV"))
    }
    keep |= {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    missing = subprocess.run(
        [folder / "bin/python", "-c", "import ml"], env=keep, capture_output=True, text=True
    )
    assert "No module named 'ml'" in missing.stderr
    return folder / "bin/python", keep


def ask_stranger(stranger: tuple[Path, dict[str, str]], folder: Path, code: str) -> Any:
    python, variables = stranger
    done = subprocess.run([python, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_model_has_both_flavours_signature_example_code_and_pinned_requirements(model: Path) -> None:
    described = YAML(typ="safe").load((model / "MLmodel").read_text())
    assert set(described["flavors"]) == {"pytorch", "python_function"}
    (taken,) = json.loads(described["signature"]["inputs"])
    assert taken["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 28, 28]}
    (given,) = json.loads(described["signature"]["outputs"])
    assert given["tensor-spec"] == {"dtype": "float32", "shape": [-1, 10]}
    assert (model / described["saved_input_example_info"]["artifact_path"]).exists()
    assert "class MiniCNN" in (model / "code/ml/task/model.py").read_text()
    lines = (model / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert f"mlflow=={version('mlflow')}" in lines
    conda = YAML(typ="safe").load((model / "conda.yaml").read_text())
    assert conda["dependencies"][-1] == {"pip": lines}


def test_model_holds_no_pickled_network_and_no_path_of_this_machine(model: Path) -> None:
    assert not [path for path in model.rglob("*") if path.suffix in (".pkl", ".pth", ".pt", ".bin")]
    with zipfile.ZipFile(model / "data/model.pt2") as archive:
        pickled = [
            name
            for name in archive.namelist()
            if archive.read(name)[:2] == b"PK" or b"cpickle" in archive.read(name)
        ]
        assert all("sample_inputs" in name for name in pickled), pickled
        assert not any(b"site-packages" in archive.read(name) for name in archive.namelist())


def test_both_flavours_load_elsewhere_with_unpickling_forbidden_and_refuse_other_arrays(
    model: Path, expected: Golden, stranger: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", expected.images)
    code = f"""
import json, numpy, torch, mlflow
images = numpy.load("images.npy")
served = mlflow.pyfunc.load_model({str(model)!r})
refused = 0
for wrong in (images.astype("float32"), images[:, :27], images[0]):
    try:
        served.predict(wrong)
    except mlflow.exceptions.MlflowException as error:
        assert "nforce" in str(error) or "hape" in str(error), error
        refused += 1
assert refused == 3
one = mlflow.pytorch.load_model({str(model)!r})(torch.from_numpy(images)).detach().numpy()
two = served.predict(images)
print(json.dumps([one.tolist(), two.tolist()]))
"""
    for answer in ask_stranger(stranger, tmp_path, code):
        assert np.abs(np.array(answer) - expected.probabilities).max() < 1e-4


def test_class_and_weights_that_travel_make_the_network_again(
    model: Path, expected: Golden, stranger: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", expected.images)
    code = f"""
import json, sys, numpy, torch
sys.path.insert(0, {str(model / 'code')!r})
from ml.task.model import build_model
from ml.task.params import ModelParams
from safetensors.torch import load_file
network = build_model(ModelParams(channels=[16, 32]), (28, 28), 10, 0.0, 1.0)
network.load_state_dict(load_file({str(model / 'extra_files/model.safetensors')!r}))
print(json.dumps(network.eval()(torch.from_numpy(numpy.load("images.npy"))).exp().tolist()))
"""
    answer = ask_stranger(stranger, tmp_path, code)
    assert np.abs(np.array(answer) - expected.probabilities).max() < 1e-4


@pytest.fixture(scope="module")
def served(
    model: Path, stranger: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of `mlflow models serve` in an empty folder."""
    python, variables = stranger
    port, folder = free_port(), tmp_path_factory.mktemp("empty")
    command = [
        str(python),
        "-m",
        "mlflow",
        "models",
        "serve",
        "--model-uri",
        str(model),
        "--env-manager",
        "local",
    ]
    command += ["--port", str(port), "--workers", "1"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                if requests.get(f"http://127.0.0.1:{port}/ping", timeout=5).ok:
                    break
            except requests.RequestException:
                pass
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def curl(address: str, body: str) -> tuple[int, str]:
    """Status and body that `curl` gets from /invocations."""
    if not shutil.which("curl"):
        pytest.skip("curl is missing")
    command = [
        "curl",
        "--silent",
        "--write-out",
        "\n%{http_code}",
        "--header",
        "Content-Type: application/json",
    ]
    done = subprocess.run(
        [*command, "--data", "@-", f"{address}/invocations"],
        input=body,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), answer


def test_served_model_answers_curl(served: str, expected: Golden) -> None:
    status, answer = curl(served, json.dumps({"inputs": expected.images[:3].tolist()}))
    assert status == 200, answer
    assert np.abs(np.array(json.loads(answer)["predictions"]) - expected.probabilities[:3]).max() < 1e-4


def test_served_model_answers_its_own_example(served: str, model: Path) -> None:
    status, answer = curl(served, (model / "serving_input_example.json").read_text())
    assert status == 200 and np.array(json.loads(answer)["predictions"]).shape == (2, 10)


@pytest.mark.parametrize(
    "images",
    [
        pytest.param([[[0] * 27] * 28], id="27 columns"),
        pytest.param([[0] * 28] * 28, id="no batch"),
        pytest.param([[["a"] * 28] * 28], id="texts"),
        pytest.param([[[300] * 28] * 28], id="above 255"),
        pytest.param([[[-1] * 28] * 28], id="below 0"),
        pytest.param([[[0] * 28] * 27 + [[0]]], id="ragged"),
    ],
)
def test_served_model_refuses_what_its_signature_does_not_allow(served: str, images: Any) -> None:
    status, answer = curl(served, json.dumps({"inputs": images}))
    assert 400 <= status < 500, (status, answer)


def test_code_follows_relative_imports_too(tmp_path: Path) -> None:
    source = tmp_path / "model.py"
    source.write_text(
        "from . import params\nfrom .layers import Block\nfrom ..section import Section\nimport torch\n"
    )
    found = set(imported(source, ["ml", "task"]))
    assert {"ml.task.params", "ml.task.layers", "ml.section"} <= found and "torch" not in found
