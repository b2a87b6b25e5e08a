"""The release's files against the sums in its tag: packages and links can be changed by others, a protected tag cannot."""

import hashlib
from typing import Any
from urllib.parse import quote

import pytest

from tests.gitlab_emulator.rights import DEVELOPER, MAINTAINER
from tests.gitlab_emulator_fixtures import ask
from tests.release_project import ReleaseProject, published

pytest_plugins = ["tests.release_fixtures"]

BUNDLE = ("model.onnx", "golden.npz", "experiment.json")


def write(project: ReleaseProject, method: str, path: str, role: int = DEVELOPER, **body: Any) -> None:
    """As somebody of that role."""
    answer = ask(project.gitlab, method, f"/projects/64{path}", level=role, **body)
    assert answer.ok, answer.text


def replace(project: ReleaseProject, version: str, name: str) -> None:
    """A Developer uploads another file of the name, which is the one that is served from then on."""
    write(project, "PUT", f"/packages/generic/model/{version}/{name}", data=b"the attacker's")


@pytest.mark.parametrize("name", BUNDLE)
def test_file_that_a_developer_replaced_is_refused_by_name(project: ReleaseProject, name: str) -> None:
    project.propose(5, "Say more in the docs", epochs=None, files={"README.md": "more\n"})
    project.merge(5)
    replace(project, "1.0.0", name)
    before = published(project)

    message = project.release(fails=f"{name} in the package model/1.0.0 is not the file")

    digest = hashlib.sha256(b"the attacker's").hexdigest()
    assert digest in message and "SHA256SUMS in the tag says" in message and "Package registry" in message
    assert published(project) == before


def test_file_replaced_before_the_job_ran_again_is_put_back_and_named(project: ReleaseProject) -> None:
    merged = project.merge(4)
    project.release(merged)
    right = project.gitlab.project.packages[("model", "1.0.1")]["model.onnx"]
    replace(project, "1.0.1", "model.onnx")

    project.release(merged)

    [warning] = project.facts()["warnings"]
    assert "model.onnx in the package model/1.0.1 was another file" in warning
    assert project.gitlab.project.packages[("model", "1.0.1")]["model.onnx"] == right


def test_links_that_do_not_fit_are_named_and_led_back(project: ReleaseProject) -> None:
    merged = project.merge(4)
    project.release(merged)
    links = project.gitlab.project.releases["model-v1.0.1"]["assets"]["links"]
    [model] = [link for link in links if link["name"] == "model.onnx"]
    path = f"/releases/{quote('model-v1.0.1')}/assets/links"
    elsewhere, more = "https://attacker.test/model.onnx", "https://attacker.test/tool"
    write(project, "PUT", f"{path}/{model['id']}", MAINTAINER, json={"url": elsewhere})
    write(project, "POST", path, MAINTAINER, json={"name": "tool", "url": more})
    write(project, "POST", path, MAINTAINER, json={"name": "image", "url": "https://registry.test/deployed"})

    project.release(merged)

    moved, foreign = project.facts()["warnings"]
    assert (
        f"led to {elsewhere}; it leads to " in moved and "/packages/generic/model/1.0.1/model.onnx" in moved
    )
    assert f"'tool' to {more}" in foreign
    found = {
        link["name"]: link["url"]
        for link in project.gitlab.project.releases["model-v1.0.1"]["assets"]["links"]
    }
    assert found["model.onnx"].startswith(project.gitlab.url) and found["tool"] == more


def test_bytes_that_come_out_otherwise_are_taken_from_the_package_or_refused(
    project: ReleaseProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's image has another version of what writes experiment.json and the card than the one of the first try."""
    from ml import bundle
    from ml.report import card

    merged = project.merge(4)
    project.release(merged)
    before, described, written = published(project), bundle.describe, card.card
    monkeypatch.setattr(
        bundle, "describe", lambda tag: described(tag).model_copy(update={"dataset": "otherwise"})
    )
    monkeypatch.setattr(card, "card", lambda facts: written(facts) + "otherwise\n")

    project.release(merged)
    assert published(project) == before
    package = project.gitlab.project.packages[("model", "1.0.1")]
    assert (project.last / "models/model-v1.0.1/experiment.json").read_bytes() == package["experiment.json"]

    for name in ("experiment.json", "model_card.md"):
        package.files = [file for file in package.files if file.name != name]
    message = project.release(merged, fails="experiment.json comes out otherwise than model-v1.0.1 says")
    assert "delete the tag model-v1.0.1" in message


def test_tag_by_hand_is_no_release(project: ReleaseProject) -> None:
    merged = project.merge(4)
    project.origin("tag", "--annotate", "--message", "By hand", "model-v1.0.1", merged)
    before = published(project)
    project.release(merged, fails="model-v1.0.1 does not name its model .* was not made by the release job")
    assert published(project) == before


def test_tags_pipeline_is_offered_and_the_lock_on_main_starts_none(project: ReleaseProject) -> None:
    project.propose(5, "Have pipelines", epochs=5, files={".gitlab-ci.yml": "job: {script: true}\n"})
    project.review(5)
    merged = project.merge(5)

    project.release(merged)

    started = {(each["ref"], each["sha"]): each["status"] for each in project.gitlab.project.pipelines}
    assert started[("model-v1.0.1", project.main)] != "skipped"
    assert started[("main", project.main)] == "skipped"
    assert "skip" not in project.origin("show", "--no-patch", "--format=%B", "main")
