"""The semantic version of a released model, model-vX.Y.Z.

| part | raised when |
|---|---|
| major | the label `release::major`; a commit `type!: …` or `BREAKING CHANGE: …`; other classes or image size than before |
| minor | the label `release::minor`; a commit `feat: …`; data, code or packages changed |
| patch | the label `release::patch`; commits `fix: …` and other types; only params changed |

The label on the merge request decides alone. Else commits that follow the convention do (conventionalcommits.org),
and where none does, what changed in dvc.lock since the last release. Other classes or another image size are never
less than major without a label, since whoever calls the model has to change too. The first release is 1.0.0.
"""

import hashlib
import json
import re
from typing import Any, Literal, NamedTuple

from ml.lock import Lock

PREFIX = "model-v"
LABEL = "release::"
TAG = re.compile(rf"{PREFIX}(0|[1-9]\d{{0,5}})\.(0|[1-9]\d{{0,5}})\.(0|[1-9]\d{{0,5}})")
CONVENTIONAL = re.compile(r"^(?P<type>[a-z]+)(\([^)\n]*\))?(?P<breaking>!)?: \S")
BREAKING = re.compile(r"^BREAKING[ -]CHANGE: \S", re.MULTILINE)
TYPES = ("feat", "fix", "perf", "refactor", "build", "chore", "ci", "docs", "style", "test", "revert")

Part = Literal["major", "minor", "patch"]
PARTS: tuple[Part, ...] = ("major", "minor", "patch")  # the greatest first


class Version(NamedTuple):
    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @property
    def tag(self) -> str:
        return f"{PREFIX}{self}"

    def raised(self, part: Part) -> "Version":
        if part == "major":
            return Version(self.major + 1, 0, 0)
        return (
            Version(self.major, self.minor + 1, 0) if part == "minor" else self._replace(patch=self.patch + 1)
        )


FIRST = Version(1, 0, 0)


def parse_version(tag: str) -> Version | None:
    match = TAG.fullmatch(tag)
    return Version(*map(int, match.groups())) if match else None


def interface_hash(data: dict[str, Any]) -> str:
    """A short hash of what callers of the model rely on: class names in order, and the images' size."""
    relied_on = [data["class_names"], data["image_height"], data["image_width"]]
    return hashlib.sha256(json.dumps(relied_on).encode()).hexdigest()[:16]


def by_labels(labels: tuple[str, ...]) -> Part | None:
    return next((part for part in PARTS if f"{LABEL}{part}" in labels), None)


def by_commits(messages: list[str]) -> Part | None:
    """The greatest that a message asks for; None when none of them follows the convention."""
    found: set[Part] = set()
    for message in messages:
        match = CONVENTIONAL.match(message)
        if match is None or match["type"] not in TYPES:
            continue
        if match["breaking"] or BREAKING.search(message):
            found.add("major")
        else:
            found.add("minor" if match["type"] == "feat" else "patch")
    return next((part for part in PARTS if part in found), None)


def by_changes(before: Lock | None, now: Lock) -> Part:
    """From what the results were made of; minor when nobody knows what it was before."""
    return "patch" if before is not None and before.sources == now.sources else "minor"


def choose(
    last: Version | None,
    labels: tuple[str, ...],
    messages: list[str],
    same_interface: bool,
    before: Lock | None,
    now: Lock,
) -> tuple[Version, str]:
    """The next version, and why that one."""
    if last is None:
        return FIRST, "the first release"
    labelled = by_labels(labels)
    if labelled:
        return last.raised(labelled), f"label {LABEL}{labelled}"
    if not same_interface:
        return last.raised("major"), "the classes or the image size changed"
    told = by_commits(messages)
    if told:
        return last.raised(told), "the commits' messages"
    changed = by_changes(before, now)
    reason = "only params changed" if changed == "patch" else "data, code or packages changed"
    return last.raised(changed), reason
