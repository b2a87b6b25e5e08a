"""A release to a GitLab below a path of its host and behind a private CA: API, git, packages, and the registry's trace."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml.settings import Settings
from ml.tracking import trace
from tests.certificates import make_certificates
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_front import Front
from tests.release_project import ReleaseProject

pytest_plugins = ["tests.release_fixtures"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"), "127.0.0.1")


@pytest.fixture
def front(project: ReleaseProject, certificates: Path) -> Iterator[Front]:
    with Front(project.gitlab.url, "/gitlab", certificates) as front:
        yield front


def at(front: Front, project: ReleaseProject) -> dict[str, str]:
    """The job's variables, with the front's addresses."""
    found = project.release_environment("")
    return {
        name: value.replace(project.gitlab.url, front.url)
        for name, value in found.items()
        if project.gitlab.url in value
    }


def test_release_goes_below_a_path_and_behind_a_private_ca(
    project: ReleaseProject, front: Front, certificates: Path
) -> None:
    merged = project.merge(4)

    project.release(merged, **at(front, project), CI_SERVER_TLS_CA_FILE=str(certificates / "root.pem"))

    assert project.tags() == ["model-v1.0.0", "model-v1.0.1"]
    assert project.origin("rev-parse", "main^") == merged
    assert project.facts()["warnings"] == []
    assert project.trailers("model-v1.0.1")["Merge-Request"] == f"{front.url}/g/proj/-/merge_requests/4"


def test_certificate_that_is_not_trusted_stops_the_release_at_once(
    project: ReleaseProject, front: Front
) -> None:
    project.merge(4)
    began = time.monotonic()
    project.release(**at(front, project), fails="certificate verify failed.*CI_SERVER_TLS_CA_FILE")
    assert time.monotonic() - began < 15  # s, of which the checkout takes some; to ask again takes minutes


@pytest.fixture(scope="module")
def commented(certificates: Path) -> Iterator[tuple[GitLabEmulator, Front, int]]:
    """Merge request 4 has a note, whose number is the last one."""
    with GitLabEmulator() as gitlab, Front(gitlab.url, "/gitlab", certificates) as front:
        gitlab.add_merge_request(4)
        yield gitlab, front, gitlab.add_note(4, "The comment").id


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ("/g/proj/-/merge_requests/4", True),
        ("/g/proj/-/merge_requests/4#note_{note}", True),
        ("/g/proj/-/merge_requests/4#note_999999", False),
        ("/g/proj/-/merge_requests/44", False),
        ("/g/other/-/merge_requests/4", False),
    ],
)
def test_comment_is_looked_for_in_the_project_and_not_in_the_path_of_the_host(
    commented: tuple[GitLabEmulator, Front, int], certificates: Path, place: str, there: bool
) -> None:
    gitlab, front, note = commented
    url = front.url + place.format(note=note)
    settings = Settings(
        ci_api_v4_url=f"{front.url}/api/v4",
        repo_token=gitlab.token,
        ci_server_tls_ca_file=certificates / "root.pem",
    )
    match = trace.NOTE.fullmatch(url)
    assert match is not None
    assert trace.exists(url, match, settings) == there
    # another application of the host's
    elsewhere = url.replace("/gitlab/", "/")
    match = trace.NOTE.fullmatch(elsewhere)
    assert match is not None and trace.exists(elsewhere, match, settings) is None
