"""What is installed where: small images stay small, every package is pinned, and layers point one way."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
HEAVY = {"torch", "torchvision", "mlflow", "mlflow-skinny"}
WITHOUT_PIN = {"setuptools"}  # a part of the environment itself: `pip freeze` leaves it out
LIGHT_MODULES = ("errors", "files", "metrics", "params", "progress", "cost", "settings")


@cache
def installed(name: str) -> tuple[Version | None, list[Requirement]]:
    """The version of a distribution that is installed here and what it asks for; None and nothing if it is not."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None, []
    return Version(found.version), [Requirement(text) for text in found.requires or []]


def closure(*extras: str) -> dict[str, Version | None]:
    """Every distribution that `pip install .[extras]` needs, with the version installed here, None where it is not."""
    todo = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
    todo += [Requirement(text) for extra in extras for text in EXTRAS[extra]]
    found: dict[str, Version | None] = {}
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            found[name], needed = installed(name)
            todo += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return found


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.parametrize("extra, without", [("report", HEAVY), ("serve", HEAVY | {"pandas", "scikit-learn"})])
def test_small_images_need_neither_torch_nor_mlflow(extra: str, without: set[str]) -> None:
    needed = closure(extra)
    assert not without & needed.keys()
    direct = {canonicalize_name(Requirement(text).name) for text in EXTRAS[extra]}
    assert direct <= needed.keys() and len(needed) > len(direct) + 5  # the walk did go on


def test_closure_is_walked_to_the_end_with_extras_and_markers() -> None:
    assert {"torch", "sympy", "mpmath"} <= closure("train").keys()  # torch → sympy → mpmath
    assert {"dvc", "dvc-gdrive", "pydrive2"} <= closure("pipeline").keys()
    assert "pywin32" not in closure(*EXTRAS) or sys.platform == "win32"


def test_every_package_that_is_needed_and_installed_is_pinned_at_its_version() -> None:
    pinned, wrong = pins(), []
    for name, version in sorted(closure(*EXTRAS).items()):
        if version is None or name in WITHOUT_PIN:
            continue
        if name not in pinned:
            wrong.append(f"{name}=={version} is not in constraints.txt")
        elif not pinned[name].specifier.contains(version, prereleases=True):
            wrong.append(f"{pinned[name]} in constraints.txt, but {version} is installed")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("dvc-gdrive", "pydrive2.fs"),
        ("dvc-s3", "s3fs"),
        ("dvc-gs", "gcsfs"),
        ("dvc-azure", "adlfs"),
        ("dvc-ssh", "sshfs"),
        ("dvc-webdav", "webdav4.fsspec"),
        ("dvc-http", "aiohttp_retry"),
    ],
)
def test_client_of_each_remote_can_be_imported_under_the_pins(package: str, module: str) -> None:
    """pip resolves what cannot be imported too: dvc imports these where the remote is used, and no sooner."""
    assert installed(package)[0], f"{package} is not installed: make setup"
    needed, todo, pinned = set(), [package], pins()
    while todo:
        name = canonicalize_name(todo.pop())
        version, requirements = installed(name)
        if name not in needed and version is not None and name not in WITHOUT_PIN:
            needed.add(name)
            assert pinned[name].specifier.contains(version, prereleases=True), f"{version} of {name}"
            todo += [each.name for each in requirements if each.marker is None or each.marker.evaluate()]
    program = f"import {package.replace('-', '_')}, {module}"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr


def test_constraints_are_exact_versions_from_the_package_index_one_line_each() -> None:
    lines = [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    assert len(pins()) == len(lines)
    bad = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*( *;.*)?", line)]
    assert not bad, f"no exact version, or a local one such as +cpu, which no index has: {bad}"


def test_pins_satisfy_pyproject() -> None:
    pinned = pins()
    texts = [*PYPROJECT["project"]["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} of pyproject.toml is not in constraints.txt"
        (pin,) = pinned[name].specifier
        assert requirement.specifier.contains(pin.version), f"{pinned[name]} does not satisfy {requirement}"


def test_layers_point_one_way() -> None:
    assert PYPROJECT["tool"]["importlinter"].get("contracts"), "pyproject.toml has no import-linter contract"
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_results_can_be_read_without_torch_mlflow_and_pandas(
    modules_after: Callable[[str], set[str]],
) -> None:
    loaded = modules_after("\n".join(f"import ml.{name}" for name in LIGHT_MODULES))
    assert {f"ml.{name}" for name in LIGHT_MODULES} <= loaded
    assert not {"torch", "torchvision", "mlflow", "pandas", "matplotlib", "sklearn"} & loaded


def test_training_code_can_be_imported_without_mlflow(modules_after: Callable[[str], set[str]]) -> None:
    loaded = modules_after("import ml.fit, ml.stages.train")
    assert "torch" in loaded and "mlflow" not in loaded


def test_load_and_preprocess_start_without_torch(modules_after: Callable[[str], set[str]]) -> None:
    loaded = modules_after("import ml.stages.load, ml.stages.preprocess")
    assert not {"torch", "mlflow", "pandas"} & loaded


def test_readme_names_the_two_commands_and_has_no_placeholder_left() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "`make demo`" in readme and "`make test`" in readme
    assert not re.search(r"@[A-Z]+@", readme)
