"""What changed, read from two dvc.lock files: causes only, and nothing but a UserError for a lock that is none."""

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ml.errors import UserError
from ml import git
from ml.report import changes
from ml.lock import Lock, StageLock, flat, parse_lock, read_lock
from tests.experiment import Experiment, make_experiment, predictions

ROOT = Path(__file__).parents[1]


def lock(**stages: dict[str, Any]) -> Lock:
    empty: dict[str, Any] = {"command": "run", "deps": {}, "params": {}, "outs": {}}
    return Lock({name: StageLock(**(empty | stage)) for name, stage in stages.items()})


def test_intermediate_files_are_consequences_and_not_named() -> None:
    old = lock(a={"deps": {"src/a.py": "1"}, "outs": {"x": "1"}}, b={"deps": {"x": "1"}, "outs": {"y": "1"}})
    new = lock(a={"deps": {"src/a.py": "2"}, "outs": {"x": "2"}}, b={"deps": {"x": "2"}, "outs": {"y": "2"}})
    found = changes.changed_files(new.sources, old.sources)
    assert [(each.path, each.kind) for each in found] == [("src/a.py", "modified")]


def test_added_removed_and_modified_files_are_told_apart() -> None:
    found = changes.changed_files({"a": "1", "b": "2", "d": "1"}, {"b": "1", "c": "1", "d": "1"})
    assert [(each.path, each.kind) for each in found] == [("a", "added"), ("b", "modified"), ("c", "removed")]


def test_params_are_compared_by_value_and_key() -> None:
    found = changes.changed_values({"a": 1, "b": [1, 2], "n": None}, {"a": 1.0, "b": [1, 2], "old": "x"})
    assert [(each.key, each.before, each.after) for each in found] == [
        ("a", "1.0", "1"),
        ("n", None, "null"),
        ("old", '"x"', None),
    ]


def test_nested_params_get_dotted_keys() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [1, {"e": 2}]}}, "f": {}}) == {
        "a.b": 1,
        "a.c.d": [1, {"e": 2}],
        "f": {},
    }


def test_pins_are_read_whatever_stands_around_them() -> None:
    text = "# note\nNumPy==2.0.0\ntorch_x==2.6.0 ; python_version < '4'  # why\n-e .\nzope[a]==1\nplain\n"
    assert changes.pinned(text) == {"numpy": "2.0.0", "torch-x": "2.6.0", "zope": "1"}


@pytest.mark.skipif(not (ROOT / "dvc.lock").exists(), reason="this project has no results yet")
def test_lock_file_of_this_repository_is_read() -> None:
    found = read_lock(ROOT / "dvc.lock")
    assert "load" in found.stages
    assert found.params["load.dataset"] and found.sources["data"].endswith(".dir")


def test_missing_lock_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro"):
        read_lock(tmp_path / "dvc.lock")


@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_bytes_that_are_no_lock_are_a_user_error(content: bytes) -> None:
    with pytest.raises(UserError, match="here is not a dvc.lock"):
        parse_lock(content, "here")


trees = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from(["stages", "cmd", "deps", "outs", "params", "path", "md5", "a"]), inner, max_size=3
    ),
    max_leaves=8,
)


@given(trees)
def test_trees_that_are_no_lock_are_a_user_error_or_a_lock(tree: Any) -> None:
    text = io.BytesIO()
    YAML(typ="safe").dump({"stages": {"train": tree}}, text)
    try:
        parse_lock(text.getvalue(), "here")
    except UserError as error:
        assert "here is not a dvc.lock" in str(error)


def stage_lock(**entry: Any) -> bytes:
    text = io.BytesIO()
    YAML(typ="safe").dump({"stages": {"train": {"cmd": "run"} | entry}}, text)
    return text.getvalue()


def test_dependency_that_is_an_address_is_known_by_what_its_server_says() -> None:
    deps = [{"path": "https://e.x/a", "etag": "abc"}, {"path": "s3://e/b", "checksum": "def"}]
    assert parse_lock(stage_lock(deps=deps), "here").sources == {"https://e.x/a": "abc", "s3://e/b": "def"}


def test_wrong_types_in_a_lock_become_text_that_can_be_compared() -> None:
    found = parse_lock(stage_lock(deps=[{"path": 5, "md5": 7}], outs=[{"path": 6, "md5": [1]}]), "here")
    assert found.sources == {"5": "7"} and found.outs == {"6": "[1]"}
    assert [each.path for each in changes.changed_files(found.sources, {})] == ["5"]


@pytest.mark.parametrize("params", ["&a [*a]", "&a {b: *a}", "{a: [{? [1, 2] : 3}]}"])
def test_params_that_no_report_could_show_are_a_user_error(params: str) -> None:
    text = f"stages: {{train: {{cmd: run, params: {{params.yaml: {{x: {params}}}}}}}}}"
    with pytest.raises(UserError, match="here is not a dvc.lock"):
        parse_lock(text.encode(), "here")


@pytest.mark.parametrize("content", [b"", b"- 1", b"\xff", b"a: [", b"x: &a {b: *a}", b"a: {b: 1}"])
def test_older_params_that_cannot_be_read_are_none(content: bytes) -> None:
    assert changes.read_params(content) in ({}, {"a.b": 1})


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    made = make_experiment(tmp_path / "repo")
    monkeypatch.chdir(made.folder)
    return made


def test_params_code_data_packages_and_commands_are_found_between_two_commits(experiment: Experiment) -> None:
    experiment.write_results(predictions())
    baseline = experiment.commit()
    old = read_lock()
    experiment.params["train"]["epochs"] = 99
    experiment.write("src/train.py", "one\nthree\nfour\n")
    experiment.write("constraints.txt", "numpy==2.1.0\nscipy==1.0\n")
    experiment.write("data/more.bin", "more")
    pipeline = YAML(typ="safe").load(Path("dvc.yaml").read_text())
    pipeline["stages"]["evaluate"]["cmd"] = "false"
    YAML().dump(pipeline, Path("dvc.yaml"))
    experiment.commit()
    found = changes.compare_locks(read_lock(), old, baseline)
    assert [(each.key, each.after) for each in found.params] == [("train.epochs", "99")]
    code = found.code[0]
    assert [each.path for each in found.code] == ["src/train.py"]
    assert (code.kind, code.lines_added, code.lines_removed) == ("modified", 2, 1)
    assert [each.path for each in found.data] == ["data"]
    assert [each.path for each in found.dependencies] == ["constraints.txt"]
    assert [(each.name, each.before, each.after) for each in found.packages] == [
        ("numpy", "2.0.0", "2.1.0"),
        ("scipy", None, "1.0"),
        ("torch", "2.6.0", None),
    ]
    assert [(each.key, each.before, each.after) for each in found.commands] == [
        ("evaluate", '"true"', '"false"')
    ]


def test_file_names_of_every_kind_reach_git_as_file_names(experiment: Experiment) -> None:
    names = ["src/a b.py", "src/ü.py", "--output=x.py", "src/:(top)x.py", ":(top)x.py"]
    for name in names:
        experiment.write(name, "one\n")
    experiment.git("add", "--all", ".")
    experiment.git("commit", "--quiet", "--message", "names")
    for name in names:
        experiment.write(name, "one\ntwo\n")
    assert git.changed_lines("HEAD", names) == {name: (1, 0) for name in names}
