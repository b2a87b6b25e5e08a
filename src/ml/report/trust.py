"""What of its own judge a merge request changes, and which package judged: told above the verdict.

The jobs that judge run the package of the target branch's image, so a changed gate judges from the merge on. That a
merge request changes it is therefore no way past the gate, and all the more something that a person has to read.
"""

import fnmatch
import hashlib
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

import ml
from ml import git
from ml.report.changes import PINS, pinned
from ml.report.result import IN_FORCE, Code, FileChange, Judge, Touched

# What judges, by kind; a folder ends in a slash, and what begins with `*` is for files of such a name in any folder.
# Paths are those of the repository, or of the project's folder in it.
PACKAGE = "What judges"
MEASURES = f"How results are measured{IN_FORCE}"
PARTS: dict[str, tuple[str, ...]] = {
    PACKAGE: (
        "src/ml/report/",
        "src/ml/release/",
        # empty; what is written there runs before every module below it
        "src/ml/__init__.py",
        "src/ml/task/__init__.py",
        *(
            f"src/ml/{module}.py"
            for module in "bundle errors files git lock params plots remotes section settings validation".split()
        ),
    ),
    MEASURES: ("src/ml/metrics.py", "src/ml/stages/evaluate.py", "dvc.yaml"),
    f"The jobs{IN_FORCE}": (".gitlab-ci.yml", "*.gitlab-ci.yml", "templates/", ".ci/", ".gitlab/ci/"),
    "The image of the jobs": ("Dockerfile", ".dockerignore", "deploy/image/", "pyproject.toml", PINS),
    f"Where results lie{IN_FORCE}": (".dvc/config", ".dvc/config.local"),
}
# What those who judge import: another version of one may judge otherwise.
PACKAGES = frozenset(
    "certifi configobj dvc dvc-data dvc-objects fsspec markdown-it-py matplotlib numpy pandas psutil pydantic "
    "pydantic-core pydantic-settings python-gitlab requests ruamel-yaml safetensors scipy urllib3".split()
)


def look(commit: str, image: str | None) -> Judge:
    """What differs since the baseline `commit`, and whose code this process has; `image` is the job's."""
    tree = Tree(git.root(), git.prefix(), commit, git.files_of(commit))
    changed = git.changed_paths(commit)
    touched = []
    for part, patterns in PARTS.items():
        files = [
            tree.change(path, lines)
            for path, lines in sorted(changed.items())
            if tree.belongs(path, patterns) and tree.counts(path)
        ]
        if files:
            touched.append(Touched(part=part, files=files))
    return Judge(code=whose(tree), image=image, touched=touched)


@dataclass(frozen=True)
class Tree:
    """The repository now and at the baseline; every path is relative to its root."""

    root: Path
    folder: str  # of the project, "" for the root
    commit: str
    before: dict[str, str]  # path to blob

    def belongs(self, path: str, patterns: tuple[str, ...]) -> bool:
        """Whether a pattern is for the path, as the repository or the project names it."""
        return any(fits(name, patterns) for name in (path, path.removeprefix(self.folder)))

    def change(self, path: str, lines: tuple[int, int] | None) -> FileChange:
        added, removed = lines or (None, None)
        gone = not os.path.lexists(self.root / path)
        return FileChange(
            path=os.fsencode(path).decode("utf-8", "backslashreplace"),
            kind="removed" if gone else "modified" if path in self.before else "added",
            lines_added=added,
            lines_removed=removed,
        )

    def counts(self, path: str) -> bool:
        """Whether the change matters to what judges: of some files only a part does. One that is damaged counts."""
        part = IN_PART.get(path.rpartition("/")[2])
        if part is None:
            return True
        before = git.run("cat-file", "blob", self.before[path]) if path in self.before else b""
        here = self.root / path
        try:
            return bool(part(before) != part(here.read_bytes() if here.is_file() else b""))
        except (YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return True


def fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        name == pattern
        or (pattern.endswith("/") and name.startswith(pattern))
        or (pattern.startswith("*") and fnmatch.fnmatchcase(name.rpartition("/")[2], pattern))
        for pattern in patterns
    )


# ---- Files of which a part matters


def commands(content: bytes) -> Any:
    """Of the stages in a dvc.yaml."""
    stages = YAML(typ="safe").load(content)["stages"]
    return {name: (stage["do"] if "do" in stage else stage)["cmd"] for name, stage in stages.items()}


def build(content: bytes) -> Any:
    """Of a pyproject.toml what decides about packages; formatters and linters have their settings there too."""
    found = tomllib.loads(content.decode("utf-8"))
    own = {name: table for name, table in found.get("tool", {}).items() if name == "setuptools"}
    return found.get("project"), found.get("build-system"), own


def pins(content: bytes) -> Any:
    found = pinned(content.decode("utf-8", "replace"))
    return {name: version for name, version in found.items() if name in PACKAGES}


IN_PART: dict[str, Callable[[bytes], Any]] = {"dvc.yaml": commands, "pyproject.toml": build, PINS: pins}


# ---- Whose code judges


def whose(tree: Tree) -> Code:
    """Whether the package of this process is the baseline's, the candidate's, or of another version than both."""
    source = f"{tree.folder}src/ml/"
    before = {
        path.removeprefix(source): digest
        for path, digest in tree.before.items()
        if path.startswith(source) and judges(path.removeprefix(source))
    }
    now = judging(tree.root / source, tree.commit)
    installed = judging(Path(ml.__file__).parent, tree.commit)
    if not before and not now:
        return "unknown"
    if installed == before:
        return "both" if installed == now else "baseline"
    return "candidate" if installed == now else "other"


def judges(path: str) -> bool:
    """Whether the file of the package `ml` is one that judges."""
    return path.endswith(".py") and fits(f"src/ml/{path}", PARTS[PACKAGE])


def judging(package: Path, commit: str) -> dict[str, str]:
    """The files that judge of the package `ml` that lies there, with the names that git gives to their content."""
    found = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py") if path.is_file()}
    return {name: blob(path.read_bytes(), commit) for name, path in found.items() if judges(name)}


def blob(content: bytes, commit: str) -> str:
    """Git's name of a file's content, in a repository that names a commit like this."""
    kind = "sha1" if len(commit) == 40 else "sha256"
    return hashlib.new(kind, b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
