"""The model as an MLflow model: flavours pytorch and python_function, loadable and servable without this repository.

Nothing in it is a pickled model: the network is a graph of `torch.export` (data/model.pt2: operators as JSON, weights as
raw bytes), which MLflow also loads where MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false. With it travel the weights as
safetensors, the class with what it imports of this package (code/), and pinned requirements, given and not inferred.

    raw images (batch, height, width) uint8 → probabilities (batch, classes) float32
"""

import ast
import io
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml
from ml import files
from ml.params import PARAMS_FILE, Params, load_params

if TYPE_CHECKING:
    from torch.export import ExportedProgram

REQUIREMENTS = ("mlflow", "torch", "numpy", "safetensors", "pydantic", "ruamel.yaml")
FACTS = "extra_files/facts.json"


def save_model(folder: Path) -> None:
    """Write the last run's model into a new or empty folder. Raises UserError when a result is missing."""
    write_parts(folder, export(), load_params())
    write_description(folder)


def export() -> "ExportedProgram":
    """The graph of artifacts/model.safetensors."""
    import torch

    from ml.export import export_program
    from ml.task.model import build_model

    golden, split = files.load_golden(), files.load_split()
    height, width = golden.images.shape[1:]
    classes = golden.probabilities.shape[1]
    model = build_model(load_params().model, (height, width), classes, split.mean, split.std)
    weights = files.load_weights(files.MODEL_WEIGHTS)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return export_program(model, golden.images)


def write_parts(folder: Path, program: "ExportedProgram", params: Params) -> None:
    """All of the model but the description: what needs torch, and no MLflow."""
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    for name in ("data", "extra_files"):
        (folder / name).mkdir(parents=True)
    graph = io.BytesIO()
    torch.export.save(program, graph)
    # Not written by torch itself: on a full disk that ends the process, and the training with it.
    files.write_bytes(folder / "data" / "model.pt2", graph.getvalue())
    shutil.copyfile(files.MODEL_WEIGHTS, folder / "extra_files" / files.MODEL_WEIGHTS.name)
    shutil.copyfile(PARAMS_FILE, folder / "extra_files" / PARAMS_FILE.name)
    copy_code(folder / "code")
    golden = files.load_golden()
    example = golden.images[:2].tolist()
    files.write_json(folder / "input_example.json", example)
    files.write_json(folder / "serving_input_example.json", {"inputs": example})
    files.write_json(
        folder / FACTS,
        {
            "image_shape": list(golden.images.shape[1:]),
            "classes": int(golden.probabilities.shape[1]),
            "class_names": files.read_json(files.DATA_SUMMARY, "load")["class_names"],
            "torch": str(torch.__version__),
            "model_sha256": files.sha256(files.MODEL_ONNX),
            "requirements": pinned(REQUIREMENTS),
        },
    )


def copy_code(folder: Path) -> None:
    """ml.task.model and every module of this package that it imports, directly or not."""
    source = Path(ml.__path__[0]).parent
    todo, seen = ["ml.task.model"], set()
    while todo:
        name = todo.pop()
        for path in (
            source.joinpath(*name.split(".")).with_suffix(".py"),
            source.joinpath(*name.split("."), "__init__.py"),
        ):
            if path.is_file() and path not in seen:
                seen.add(path)
                todo += imported(path, list(path.relative_to(source).parent.parts))
    for path in seen:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def imported(path: Path, package: list[str]) -> list[str]:
    """Names of this package's modules that a file imports, anywhere in it, with the packages that they lie in.

    Args:
        package: where the file lies, from which its relative imports count.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*up, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    ours = [name.split(".") for name in names if name.split(".")[0] == ml.__name__]
    return [".".join(parts[:length]) for parts in ours for length in range(1, len(parts) + 1)]


def pinned(names: tuple[str, ...]) -> list[str]:
    """name==version of what is installed; a build's own suffix, such as +cpu, is not in the index."""
    found = []
    for name in names:
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return found


def write_description(folder: Path) -> None:
    """MLmodel, conda.yaml, python_env.yaml, requirements.txt: what needs MLflow, and no torch."""
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, *facts["image_shape"]))]),
        Schema([TensorSpec(np.dtype("float32"), (-1, facts["classes"]))]),
    )
    model = Model(
        signature=signature,
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "type": "ndarray",
            "serving_input_path": "serving_input_example.json",
        },
        metadata={"class_names": facts["class_names"], "model_sha256": facts["model_sha256"]},
    )
    model.add_flavor("pytorch", model_data="data", pytorch_version=facts["torch"], code="code")
    model.add_flavor(
        "python_function",
        loader_module="mlflow.pytorch",
        python_version=platform.python_version(),
        data="data",
        code="code",
        env={"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
        config={"device": "cpu"},  # where the graph's weights are
    )
    model.model_size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    model.save(str(folder / "MLmodel"))
    files.write_text(folder / "requirements.txt", "\n".join(facts["requirements"]) + "\n")
    python = platform.python_version()
    files.write_json(  # JSON is YAML
        folder / "python_env.yaml",
        {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]},
    )
    conda = {"name": "mlflow-env", "channels": ["conda-forge"],
             "dependencies": [f"python={python}", "pip", {"pip": facts["requirements"]}]}  # fmt: skip
    files.write_json(folder / "conda.yaml", conda)
