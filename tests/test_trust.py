"""The judge is not part of the judged: a merge request that edits it is judged by the target's, and told of."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from ml.report import comment, note, result, trust
from ml.report.result import Changes, FileChange, Judge, Touched
from tests.comparisons import comparison
from tests.experiment import Experiment, make_experiment, predictions

ROOT = Path(__file__).parents[1]
JUDGES = (
    "ml.report.compare",
    "ml.report.comment",
    "ml.report.publish",
    "ml.report.gate",
    "ml.report.failure",
    "ml.release.remote",
    "ml.release.preflight",
    "ml.release.lock_gate",
    "ml.release.publish",
)


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    made = make_experiment(tmp_path / "repo")
    monkeypatch.chdir(made.folder)
    return made


def copy_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "src/ml", folder / "ml", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def job(
    folder: Path, package: Path, module: str, *arguments: str, **more: str
) -> "subprocess.CompletedProcess[str]":
    """A command as a job that judges runs it: `package` is what the image has installed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CI_", "PYTHON"))}
    environment = inherited | {"PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"} | more
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=120)


# A gate that lets everything pass, and modules that stand where Python looks first when it is let.
LENIENT = "\n\ndef decide(comparison, labels):  # noqa\n    return Decision(True, 'Whatever.')\n"
SHADOWS = (
    "numpy.py",
    "pydantic.py",
    "sitecustomize.py",
    "usercustomize.py",
    "ml/__init__.py",
    "ml/report/__init__.py",
)


def edit_the_judge(experiment: Experiment) -> None:
    gate = experiment.folder / "src/ml/report/gate.py"
    text = gate.read_text()
    at = text.index("def main()")
    gate.write_text(text[:at] + LENIENT.strip() + "\n\n\n" + text[at:])
    for name in SHADOWS:
        experiment.write(name, "import os\nprint('shadowed', flush=True)\nos._exit(0)\n")


@pytest.mark.slow
def test_merge_request_that_edits_its_gate_stays_red_and_is_told_of(
    experiment: Experiment, tmp_path: Path
) -> None:
    image = copy_package(tmp_path / "image")
    copy_package(experiment.folder / "src")
    experiment.write_results(predictions(wrong=0.02))
    base = experiment.commit("base")
    edit_the_judge(experiment)
    # the stages of this merge request are of another task than the image's
    experiment.params |= {
        "load": {"table": "a.csv"},
        "model": {"depth": 3},
        "train": {"epochs": 7, "seeds": [1], "trees": 5},
    }
    experiment.write_results(predictions(wrong=0.4))
    experiment.commit("passes everything")
    variables = {
        "CI_MERGE_REQUEST_IID": "3",
        "CI_MERGE_REQUEST_DIFF_BASE_SHA": base,
        "CI_JOB_IMAGE": "registry/ci:main",
    }
    for module in ("ml.report.compare", "ml.report.comment"):
        done = job(experiment.folder, image, module, **variables)
        assert done.returncode == 0 and "shadowed" not in done.stdout, done.stdout + done.stderr
    gate = job(experiment.folder, image, "ml.report.gate", **variables)
    assert gate.returncode == 1 and "gate blocks: The candidate is worse" in gate.stdout, (
        gate.stdout + gate.stderr
    )

    text = (experiment.folder / "reports/comment.md").read_text()
    above, _, below = text.partition("## 🔴 Worse")
    assert "This merge request changes what judges it" in above and below
    assert (
        f"by the target branch's own code ({base[:8]}) in the image `registry/ci:main`, not by this change"
        in above
    )
    assert "- What judges: `src/ml/report/gate.py` modified (+4 −0 lines)" in above

    # what the jobs did before: the checkout's own package comes first
    fooled = job(experiment.folder, experiment.folder / "src", "ml.report.gate", **variables)
    assert fooled.returncode == 0 and "Whatever." in fooled.stdout
    shadowed = job(experiment.folder, image, "ml.report.gate", **variables, PYTHONSAFEPATH="")
    assert "shadowed" in shadowed.stdout
    own = job(experiment.folder, experiment.folder / "src", "ml.report.compare", **variables)
    assert own.returncode == 0 and result.load(experiment.folder / result.COMPARISON).judge
    assert result.load(experiment.folder / result.COMPARISON).judge.code == "candidate"  # type: ignore[union-attr]


def test_pictures_are_drawn_as_the_judge_draws_them_whatever_the_checkout_sets(
    experiment: Experiment, tmp_path: Path
) -> None:
    """matplotlib reads a matplotlibrc of the working folder: white lines on white would hide a loss."""
    experiment.write_results(predictions(wrong=0.02))
    base = experiment.commit("base")
    experiment.write_results(predictions(wrong=0.4))
    experiment.commit("worse")
    drawn = []
    for settings in ("", 'axes.prop_cycle: cycler("color", ["white"])\ntext.color: white\nfigure.dpi: 10\n'):
        if settings:
            experiment.write("matplotlibrc", settings)
        done = job(experiment.folder, ROOT / "src", "ml.report.compare", CI_MERGE_REQUEST_DIFF_BASE_SHA=base)
        assert done.returncode == 0, done.stderr
        pictures = sorted((experiment.folder / "reports/comparison").glob("*.png"))
        drawn.append({path.name: path.read_bytes() for path in pictures})
    assert drawn[0] and drawn[0] == drawn[1]


def save(experiment: Experiment, message: str) -> str:
    experiment.git("add", "--all")
    experiment.git("commit", "--quiet", "--allow-empty", "--message", message)
    return experiment.git("rev-parse", "HEAD")


def touched(commit: str) -> dict[str, list[tuple[str, str, int | None, int | None]]]:
    return {
        part.part: [(each.path, each.kind, each.lines_added, each.lines_removed) for each in part.files]
        for part in trust.look(commit, None).touched
    }


def start(experiment: Experiment, files: dict[str, str | bytes], folder: str = "") -> str:
    for name, content in files.items():
        path = experiment.folder / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return save(experiment, "start")


FILES: dict[str, str | bytes] = {
    ".gitlab-ci.yml": "a\n",
    ".ci/build.sh": "a\n",
    "templates/experiment/template.yml": "a\n",
    "Dockerfile": "a\n",
    ".dvc/config": "[core]\n",
    "src/ml/report/gate.py": "a\nb\n",
    "src/ml/release/publish.py": "a\n",
    "src/ml/metrics.py": "a\n",
    "src/ml/task/model.py": "a\n",
    "docs/report/gate.py": "a\n",
    "README.md": "a\n",
}


def test_every_kind_of_change_to_the_judge_is_listed_with_its_lines(experiment: Experiment) -> None:
    base = start(experiment, FILES)
    assert touched(base) == {}
    Path("src/ml/report/gate.py").rename("src/ml/report/gates.py")
    Path(".ci/build.sh").unlink()
    Path("Dockerfile").write_bytes(b"\0binary")
    for name in ("src/ml/task/model.py", "docs/report/gate.py", "README.md"):
        Path(name).write_text("other\n")
    Path("src/ml/metrics.py").write_text("a\nb\nc\n")
    Path("ci").mkdir()
    Path("ci/more.gitlab-ci.yml").write_text("x\n")
    save(experiment, "judge")
    assert touched(base) == {
        "What judges": [
            ("src/ml/report/gate.py", "removed", 0, 2),
            ("src/ml/report/gates.py", "added", 2, 0),
        ],
        trust.MEASURES: [("src/ml/metrics.py", "modified", 2, 0)],
        "The jobs (in force here)": [
            (".ci/build.sh", "removed", 0, 1),
            ("ci/more.gitlab-ci.yml", "added", 1, 0),
        ],
        "The image of the jobs": [("Dockerfile", "modified", None, None)],
    }


@pytest.mark.parametrize(
    "name",
    ["src/ml/report/a\nb.py", "src/ml/report/`|@all.py", "src/ml/report/größe.py", b"src/ml/report/\xff.py"],
)
def test_odd_names_are_shown_and_do_nothing(experiment: Experiment, name: str | bytes) -> None:
    base = start(experiment, FILES)
    Path(os.fsdecode(name)).write_text("a\n")
    save(experiment, "odd")
    look = trust.look(base, "image\n/approve")
    assert [each.kind for each in look.touched[0].files] == ["added"]
    text = comment.compose(comparison(judge=look), [], [])
    top = text.partition("## ")[0]
    assert top.count("\n- ") == 1 and "\n/" not in top and "added (+1 −0 lines)" in top


def test_project_in_a_folder_has_its_own_files_and_the_repositorys_jobs(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(experiment, FILES, "models/mnist")
    base = start(experiment, {".gitlab-ci.yml": "a\n", "src/ml/report/gate.py": "other project\n"})
    monkeypatch.chdir("models/mnist")
    for name in (".gitlab-ci.yml", "../../.gitlab-ci.yml", "src/ml/report/gate.py", "../../README"):
        Path(name).write_text("changed\n")
    save(experiment, "judge")
    found = touched(base)
    assert [each[0] for each in found["The jobs (in force here)"]] == [
        ".gitlab-ci.yml",
        "models/mnist/.gitlab-ci.yml",
    ]
    assert [each[0] for each in found["What judges"]] == ["models/mnist/src/ml/report/gate.py"]
    assert set(found) == {"The jobs (in force here)", "What judges"}


@pytest.mark.parametrize(
    ("name", "before", "harmless", "telling"),
    [
        ("constraints.txt", "numpy==2.0.0\ntorch==2.6.0\n", "numpy==2.0.0\ntorch==2.7.0\n", "numpy==2.1.0\n"),
        (
            "pyproject.toml",
            '[project]\nname = "ml"\n[tool.black]\nline-length = 1\n',
            '[project]\nname = "ml"\n[tool.black]\nline-length = 2\n',
            '[project]\nname = "ml"\ndependencies = ["x"]\n',
        ),
        (
            "dvc.yaml",
            "stages: {evaluate: {cmd: a, deps: [b]}}\n",
            "stages: {evaluate: {cmd: a, deps: [b, c]}}\n",
            "stages: {evaluate: {cmd: fake, deps: [b]}}\n",
        ),
        ("pyproject.toml", "[project]\n", "[project]\n# a remark\n", "[project\n"),
        ("dvc.yaml", "stages: {a: {cmd: a}}\n", "stages:\n  a: {cmd: a}\n", "stages: [\n"),
    ],
)
def test_of_some_files_only_what_judges_counts(
    experiment: Experiment, name: str, before: str, harmless: str, telling: str
) -> None:
    start(experiment, FILES)
    Path(name).write_text(before)
    base = save(experiment, "before")
    Path(name).write_text(harmless)
    assert touched(base) == {}
    Path(name).write_text(telling)
    assert [[each[0] for each in files] for files in touched(base).values()] == [[name]]


def test_whose_code_judged_is_told_by_its_content(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = start(experiment, FILES)
    assert trust.look(base, None).code == "other"
    image = copy_package(tmp_path / "image") / "ml"
    monkeypatch.setattr(trust.ml, "__file__", str(image / "__init__.py"))
    shutil.rmtree("src/ml")
    shutil.copytree(image, "src/ml")
    base = save(experiment, "the image's own")
    assert trust.look(base, None).code == "both"
    Path("src/ml/report/gate.py").write_text("edited\n")
    Path("src/ml/task/model.py").write_text("the task's\n")
    assert trust.look(base, None).code == "baseline"
    edited = save(experiment, "edited")
    (image / "report/gate.py").write_text("edited\n")
    assert trust.look(base, None).code == "candidate"
    Path("src/ml/report/gate.py").unlink()
    assert trust.look(edited, None).code == "baseline"
    shutil.rmtree("src/ml")
    gone = save(experiment, "gone")
    assert trust.look(gone, None).code == "unknown"


SAYS = {
    "baseline": "by the target branch's own code (bbbbbbbb) in the image `registry/ci:main`, not by this change",
    "candidate": "**The verdict below is by the changed code itself** in the image",
    "both": "by code that both sides have in the image",
    "other": "by code of another version than both sides' in the image",
    "unknown": "by the installed package in the image",
}


@pytest.mark.parametrize("code", SAYS)
def test_comment_says_above_the_verdict_that_the_judge_is_changed_and_who_judged(code: Any) -> None:
    file = FileChange(path="src/ml/report/gate.py", kind="modified", lines_added=3, lines_removed=1)
    judge = Judge(code=code, image="registry/ci:main", touched=[Touched(part="What judges", files=[file])])
    nothing = Changes(params=[], code=[], data=[], dependencies=[], packages=[], commands=[])
    text = comment.compose(comparison(judge=judge, changes=nothing), [], [])
    above = text.partition("\n## ")[0]
    assert above.startswith("⚠️ **This merge request changes what judges it.**") and SAYS[code] in above
    assert "- What judges: `src/ml/report/gate.py` modified (+3 −1 lines)" in above
    assert "Nothing that the results depend on" not in text and "what judges them is not" in text
    assert note.verdict_of(text).startswith("⚪"), "the history lists the verdict, not the warning"


def test_comment_without_a_change_of_the_judge_begins_with_the_verdict() -> None:
    nothing = Changes(params=[], code=[], data=[], dependencies=[], packages=[], commands=[])
    for judge in (None, Judge(code="both", image=None, touched=[])):
        text = comment.compose(comparison(judge=judge, changes=nothing), [], [])
        assert text.startswith("## ") and "Nothing that the results depend on" in text


def test_every_module_that_the_judges_import_is_declared(modules_after: Callable[[str], set[str]]) -> None:
    loaded = modules_after("\n".join(f"import {name}" for name in JUDGES))
    own = {name[3:].replace(".", "/") for name in loaded if name == "ml" or name.startswith("ml.")}
    named = [f"{name}.py" for name in own] + [f"{name}/__init__.py".removeprefix("/") for name in own]
    files = [name for name in named if (ROOT / "src/ml" / name).is_file()]
    assert len(files) > 30
    measured = trust.PARTS[trust.MEASURES]
    undeclared = [name for name in files if not trust.judges(name) and f"src/ml/{name}" not in measured]
    # the checks of the task's own sections, which no judge applies
    assert undeclared == ["task/params.py"]


def test_every_declared_file_and_folder_of_the_package_is_there() -> None:
    for pattern in trust.PARTS[trust.PACKAGE]:
        assert (ROOT / pattern).exists(), pattern


def test_every_package_that_the_judges_import_is_declared() -> None:
    distributions = packages_distributions()
    used = set()
    for path in (ROOT / "src/ml").rglob("*.py"):
        if not trust.judges(path.relative_to(ROOT / "src/ml").as_posix()):
            continue
        for statement in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            if isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
                names = [statement.module]
            used |= {name.split(".")[0] for name in names}
    third = {
        distribution.lower().replace("_", "-").replace(".", "-")
        for name in used - set(sys.stdlib_module_names) - {"ml", "mlflow"}
        for distribution in distributions.get(name, [name])
        if not distribution.startswith("types-")
    }
    assert third - trust.PACKAGES == set()
