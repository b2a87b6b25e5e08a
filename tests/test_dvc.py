"""dvc.yaml against the code: a stage whose `deps` lack a module that it imports goes stale without anyone noticing."""

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]

# Nothing that these do reaches an output of a stage, so a change in them must not train anything anew.
WITHOUT_EFFECT_ON_OUTPUTS = {
    "src/ml/cost.py",  # writes what a stage cost, which is no output
    "src/ml/progress.py",
    "src/ml/raw_data.py",  # another command of ml.task.dataset
    "src/ml/settings.py",  # where to report to, how many seeds at a time
    "src/ml/task/fetch.py",  # another command of ml.task.dataset
}
TRACKING = "src/ml/tracking/"  # reports on a run, and never stops it or changes it


def module_file(name: str) -> Path | None:
    """The file of the module `name` of this package; None for other packages, names in a module, and empty files."""
    path = SOURCE / Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate if candidate.read_text() else None
    return None


def imported_files(file: Path) -> set[Path]:
    """Files of this package that `file` imports, anywhere in it, relative imports excluded (there are none)."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    found = {module_file(name) for name in names if name.split(".")[0] == "ml"}
    return {path for path in found if path}


def code_of(stage: str) -> set[str]:
    """Every file behind the outputs of `python -m ml.stages.STAGE`: what it imports, directly or not."""
    todo, seen = [SOURCE / "ml" / "stages" / f"{stage}.py"], set()
    while todo:
        file = todo.pop()
        name = file.relative_to(ROOT).as_posix()
        if file not in seen and name not in WITHOUT_EFFECT_ON_OUTPUTS and not name.startswith(TRACKING):
            seen.add(file)
            todo += imported_files(file)
    return {str(file.relative_to(ROOT)) for file in seen}


@pytest.mark.parametrize("stage", STAGES)
def test_deps_name_exactly_the_modules_that_the_stage_imports(stage: str) -> None:
    listed = {dep for dep in STAGES[stage]["deps"] if dep.startswith("src/")}
    expected = code_of(stage)
    assert listed == expected, f"deps of {stage} in dvc.yaml should be:\n" + "\n".join(
        f"      - {dep}" for dep in sorted(expected)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_output_is_cached(stage: str) -> None:
    outputs = [out for key in ("outs", "metrics", "plots") for out in STAGES[stage].get(key, [])]
    assert outputs and all(
        isinstance(out, str) for out in outputs
    ), "an output with options may have cache: false"
