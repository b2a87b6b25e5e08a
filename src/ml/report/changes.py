"""What the difference can be due to: the two dvc.lock files and the two sets of data, side by side."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ml import files
from ml.files import Examples
from ml.params import PARAMS_FILE
from ml import git
from ml.report.baseline import Side
from ml.lock import Lock, flat
from ml.report.result import (
    Changes,
    ClassBalance,
    DataDifference,
    FileChange,
    PackageChange,
    ParamChange,
    PartDifference,
)

PINS = "constraints.txt"
CODE_SUFFIXES = (".py", ".pyx", ".cu", ".cpp", ".sh")
PARTS: tuple[tuple[Literal["train", "test"], Path], ...] = (
    ("train", files.TRAIN_EXAMPLES),
    ("test", files.TEST_EXAMPLES),
)


def compare_locks(candidate: Lock, baseline: Lock, commit: str) -> Changes:
    """Only what no stage makes: a changed intermediate file is a consequence."""
    changed = changed_files(candidate.sources, baseline.sources)
    code = [each for each in changed if each.path.endswith(CODE_SUFFIXES)]
    pins = [each for each in changed if each.path == PINS]
    lines = git.changed_lines(commit, [each.path for each in code])
    return Changes(
        params=changed_values(candidate.params, baseline.params) + changed_rules(commit),
        code=[with_lines(each, lines) for each in code],
        data=[each for each in changed if each not in code and each not in pins],
        dependencies=pins,
        packages=changed_packages(commit) if pins else [],
        commands=changed_values(
            {name: stage.command for name, stage in candidate.stages.items()},
            {name: stage.command for name, stage in baseline.stages.items()},
        ),
    )


def changed_files(candidate: dict[str, str], baseline: dict[str, str]) -> list[FileChange]:
    """Of two tables from path to hash."""
    result = []
    for path in sorted(candidate.keys() | baseline.keys()):
        if path not in baseline:
            result.append(FileChange(path=path, kind="added"))
        elif path not in candidate:
            result.append(FileChange(path=path, kind="removed"))
        elif candidate[path] != baseline[path]:
            result.append(FileChange(path=path, kind="modified"))
    return result


def with_lines(change: FileChange, lines: dict[str, tuple[int, int]]) -> FileChange:
    added, removed = lines.get(change.path, (None, None))
    return change.model_copy(update={"lines_added": added, "lines_removed": removed})


def changed_values(candidate: dict[str, Any], baseline: dict[str, Any]) -> list[ParamChange]:
    return [
        ParamChange(key=key, before=as_json(baseline, key), after=as_json(candidate, key))
        for key in sorted(candidate.keys() | baseline.keys())
        if as_json(candidate, key) != as_json(baseline, key)
    ]


def changed_rules(commit: str) -> list[ParamChange]:
    """Of the report section of params.yaml, which no stage depends on, so that no dvc.lock has it."""

    def rules(content: bytes) -> dict[str, Any]:
        return {key: value for key, value in read_params(content).items() if key.startswith("report.")}

    return changed_values(rules(present_params()), rules(git.show(commit, str(PARAMS_FILE)) or b""))


def present_params() -> bytes:
    return PARAMS_FILE.read_bytes() if PARAMS_FILE.exists() else b""


def read_params(content: bytes) -> dict[str, Any]:
    """The values of a params.yaml by dotted key; none where it cannot be read, as an older commit's may be."""
    try:
        return flat(YAML(typ="safe").load(content.decode("utf-8")))
    except (YAMLError, ValueError, AttributeError, RecursionError):
        return {}


def outdated(lock: Lock, commit: str | None = None) -> list[str]:
    """What the results depend on and are older than: code, pins, params, other stages' outputs, data under DVC.

    Of the working folder, or of `commit`, whose dvc.lock `lock` is: one that was merged and not yet released still has
    the results of what came before it. Data itself is not read for this, only its .dvc file: it may be large.
    """

    def content(path: str) -> bytes | None:
        if commit is not None:
            return git.show(commit, path)
        return Path(path).read_bytes() if Path(path).is_file() else None

    edited = []
    for path, md5 in lock.sources.items():
        if path.endswith(CODE_SUFFIXES) or path == PINS:
            now = content(path)
            found = None if now is None else hashlib.md5(now, usedforsecurity=False).hexdigest()
        else:
            found = tracked_md5(content(f"{path}.dvc"))
        if found not in (None, md5):
            edited.append(path)
    deps = [dep for stage in lock.stages.values() for dep in stage.deps.items()]
    remade = {path for path, md5 in deps if lock.outs.get(path, md5) != md5}
    present = read_params(content(str(PARAMS_FILE)) or b"")
    params = [
        key for key in lock.params if key in present and as_json(present, key) != as_json(lock.params, key)
    ]
    return sorted({*edited, *remade}) + sorted(params)


def tracked_md5(content: bytes | None) -> str | None:
    """What a .dvc file says of its data; None where there is none, or it cannot be read."""
    try:
        return str(YAML(typ="safe").load(content or b"")["outs"][0]["md5"])
    except (YAMLError, ValueError, AttributeError, RecursionError, TypeError, LookupError):
        return None


def as_json(table: dict[str, Any], key: str) -> str | None:
    return json.dumps(table[key], ensure_ascii=False, default=str) if key in table else None


def changed_packages(commit: str) -> list[PackageChange]:
    """Of the two versions of the file that pins them."""
    path = Path(PINS)
    after = pinned(path.read_text(encoding="utf-8", errors="replace") if path.exists() else "")
    before = pinned((git.show(commit, PINS) or b"").decode("utf-8", "replace"))
    return [
        PackageChange(name=name, before=before.get(name), after=after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def pinned(text: str) -> dict[str, str]:
    """Package to version, from lines `name==version`; what else such a file may hold is left out."""
    found = re.findall(r"^\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*==\s*([^\s;#]+)", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


class PartSummary(BaseModel):
    examples: int
    per_class: dict[str, int]


class Summary(BaseModel):
    """What is needed of reports/data.json."""

    train: PartSummary
    test: PartSummary
    images_in_both_parts: int


def read_summary(path: Path) -> Summary:
    return Summary.model_validate_json(path.read_bytes())


def compare_data(candidate: Side, baseline: Side) -> DataDifference:
    """Example by example where a part differs; from the data summary alone where dvc.lock says that it is the same.

    Raises Unavailable when a file that is needed cannot be had.
    """
    summary = candidate.read(files.DATA_SUMMARY, read_summary)
    old_hashes, new_hashes = baseline.lock.outs, candidate.lock.outs
    changed = [
        part for part, path in PARTS if new_hashes.get(path.as_posix()) != old_hashes.get(path.as_posix())
    ]
    if not changed:
        leak = summary.images_in_both_parts
        parts = [unchanged_part(part, summary) for part, _ in PARTS]
        return DataDifference(changed=False, parts=parts, in_both_parts_before=leak, in_both_parts=leak)
    old_summary = baseline.read(files.DATA_SUMMARY, read_summary)
    parts = [
        (
            compare_part(part, candidate.examples(path), baseline.examples(path))
            if part in changed
            else unchanged_part(part, summary)
        )
        for part, path in PARTS
    ]
    return DataDifference(
        changed=True,
        parts=parts,
        in_both_parts_before=old_summary.images_in_both_parts,
        in_both_parts=summary.images_in_both_parts,
    )


def unchanged_part(part: Literal["train", "test"], summary: Summary) -> PartDifference:
    found = summary.train if part == "train" else summary.test
    balance = [ClassBalance(name=name, before=count, after=count) for name, count in found.per_class.items()]
    return PartDifference(
        part=part,
        before=found.examples,
        after=found.examples,
        added=0,
        removed=0,
        relabelled=0,
        per_class=balance,
    )


def compare_part(part: Literal["train", "test"], candidate: Examples, baseline: Examples) -> PartDifference:
    """By id, which is a hash of the pixels; a label counts as the same when its class name is."""
    new, old = named_labels(candidate), named_labels(baseline)
    names = list(dict.fromkeys(baseline.class_names.tolist() + candidate.class_names.tolist()))
    before, after = count(old.values()), count(new.values())
    return PartDifference(
        part=part,
        before=len(old),
        after=len(new),
        added=len(new.keys() - old.keys()),
        removed=len(old.keys() - new.keys()),
        relabelled=sum(new[id] != old[id] for id in new.keys() & old.keys()),
        per_class=[
            ClassBalance(name=name, before=before.get(name, 0), after=after.get(name, 0)) for name in names
        ],
    )


def named_labels(examples: Examples) -> dict[str, str]:
    return dict(zip(examples.ids.tolist(), examples.class_names[examples.labels].tolist()))


def count(names: Iterable[str]) -> dict[str, int]:
    found, counts = np.unique(list(names), return_counts=True)
    return dict(zip(found.tolist(), counts.tolist()))
