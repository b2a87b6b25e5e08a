"""Which version a release gets."""

import pytest

from ml.lock import Lock, StageLock
from ml.release.version import FIRST, Version, by_commits, choose, interface_hash, parse_version

LAST = Version(1, 4, 2)


def lock(code: str = "a", epochs: int = 1) -> Lock:
    return Lock(
        {"train": StageLock("train", {"src/train.py": code}, {"train.epochs": epochs}, {"model": "m"})}
    )


def chosen(
    labels: tuple[str, ...] = (),
    messages: tuple[str, ...] = (),
    same_interface: bool = True,
    before: Lock | None = lock(),
    now: Lock = lock(epochs=2),
) -> str:
    return str(choose(LAST, labels, list(messages), same_interface, before, now)[0])


def test_first_release_is_one() -> None:
    assert choose(None, ("release::patch",), [], True, None, lock())[0] == FIRST == Version(1, 0, 0)


def test_only_params_changed_is_a_patch_and_code_a_minor() -> None:
    assert chosen() == "1.4.3"
    assert chosen(now=lock(code="b")) == "1.5.0"
    assert chosen(before=None) == "1.5.0"


@pytest.mark.parametrize(
    ("message", "version"),
    [
        ("fix: round up", "1.4.3"),
        ("docs(readme): say more", "1.4.3"),
        ("feat(model): a third layer", "1.5.0"),
        ("feat!: other classes", "2.0.0"),
        ("fix(data)!: drop them", "2.0.0"),
        ("fix: rename\n\nBREAKING CHANGE: other names", "2.0.0"),
        ("Train longer: it helps", "1.5.0"),
        ("note: this is no type", "1.5.0"),
        ("Train longer\n\nfeat: not in the first line", "1.5.0"),
    ],
)
def test_conventional_commits_decide_where_there_are_any(message: str, version: str) -> None:
    assert chosen(messages=("Merge branch 'x'", message), now=lock(code="b")) == version


def test_greatest_commit_wins() -> None:
    assert by_commits(["fix: a", "feat: b", "chore: c"]) == "minor"
    assert by_commits(["Something else"]) is None


def test_other_classes_are_major_unless_a_label_says_otherwise() -> None:
    assert chosen(messages=("fix: a",), same_interface=False) == "2.0.0"
    assert chosen(labels=("release::patch",), same_interface=False) == "1.4.3"


@pytest.mark.parametrize(("part", "version"), [("major", "2.0.0"), ("minor", "1.5.0"), ("patch", "1.4.3")])
def test_label_decides_alone(part: str, version: str) -> None:
    labels = ("accept-regression", f"release::{part}")
    assert chosen(labels, ("feat!: everything",), False, None, lock(code="b")) == version


def test_interface_is_the_classes_in_order_and_the_size() -> None:
    data = {"class_names": ["a", "b"], "image_height": 4, "image_width": 5}
    assert interface_hash(data) == interface_hash(data | {"dataset": "other"})
    for change in ({"class_names": ["b", "a"]}, {"image_height": 5}, {"image_width": 4}):
        assert interface_hash(data | change) != interface_hash(data)


def test_only_plain_versions_are_releases() -> None:
    assert parse_version("model-v1.10.0") == Version(1, 10, 0) > Version(1, 9, 9)
    for name in (
        "model-v1.0",
        "model-v01.0.0",
        "v1.0.0",
        "model-v1.0.0-rc1",
        "xmodel-v1.0.0",
        "model-v1.0.0\n",
    ):
        assert parse_version(name) is None
