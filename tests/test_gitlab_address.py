"""GitLab behind a private CA, and below a path of its host: a real TLS server, real certificates."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ml.errors import UserError
from ml.report import publish as publishing
from ml.report.gitlab_notes import session
from ml.settings import Settings
from tests.certificates import make_certificates
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_front import Front

REPORT = "## Result\n\nDetails."


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"), "127.0.0.1")


@pytest.fixture(scope="module")
def strange_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("strange"), "127.0.0.1") / "root.pem"


@pytest.fixture
def gitlab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[GitLabEmulator]:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no `cml`
    for name in (*Settings.model_fields, "requests_ca_bundle", "curl_ca_bundle"):
        monkeypatch.delenv(name.upper(), raising=False)
    with GitLabEmulator() as emulator:
        emulator.add_merge_request(3)
        yield emulator


@pytest.fixture
def tls(gitlab: GitLabEmulator, certificates: Path) -> Iterator[Front]:
    with Front(gitlab.url, "", certificates) as front:
        yield front


def settings(gitlab: GitLabEmulator, front: Front, **more: object) -> Settings:
    """A report job's on a GitLab at the front's address."""
    given = {
        name.lower(): value.replace(gitlab.url, front.url)
        for name, value in gitlab.environment(REPO_TOKEN=gitlab.token).items()
        if value
    }
    return Settings(**(given | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["root.pem", "ca.pem", "server.pem"])
def test_comment_is_published_on_a_gitlab_that_a_private_ca_has_signed(
    gitlab: GitLabEmulator, tls: Front, certificates: Path, file: str
) -> None:
    """The runner's file may end below the root, or be the chain as the server sent it."""
    said = publishing.publish(REPORT, {}, settings(gitlab, tls, ci_server_tls_ca_file=certificates / file))
    assert said.startswith(f"python-gitlab created the report note: {tls.url}/")


def test_bundle_of_the_machine_is_trusted_beside_the_file_of_the_runner(
    gitlab: GitLabEmulator, tls: Front, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import certifi

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certifi.where())
    with session(settings(gitlab, tls, ci_server_tls_ca_file=certificates / "root.pem"), 60) as opened:
        assert opened.get(f"{tls.url}/api/v4/version", timeout=5).status_code in (200, 401)


@pytest.mark.parametrize("given", [False, True])
def test_certificate_that_nobody_here_trusts_is_an_error_at_once_with_the_remedy(
    gitlab: GitLabEmulator, tls: Front, strange_ca: Path, given: bool
) -> None:
    file = strange_ca if given else None
    began = time.monotonic()
    with pytest.raises(
        UserError, match="certificate verify failed.*CI_SERVER_TLS_CA_FILE.*tls-ca-file"
    ) as raised:
        publishing.publish(REPORT, {}, settings(gitlab, tls, ci_server_tls_ca_file=file))
    assert time.monotonic() - began < 5  # s; to ask again takes minutes
    assert gitlab.token not in str(raised.value)
    assert len(gitlab.requests) == 0


def test_certificate_of_another_host_is_an_error_at_once(
    gitlab: GitLabEmulator, tls: Front, certificates: Path
) -> None:
    found = settings(gitlab, tls, ci_server_tls_ca_file=certificates / "root.pem")
    assert found.ci_api_v4_url is not None
    other = found.model_copy(update={"ci_api_v4_url": found.ci_api_v4_url.replace("127.0.0.1", "localhost")})
    with pytest.raises(UserError, match="certificate verify failed: Hostname mismatch"):
        publishing.publish(REPORT, {}, other)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_file_of_authorities_that_cannot_be_used_is_named(
    gitlab: GitLabEmulator, tls: Front, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="CI_SERVER_TLS_CA_FILE names .*ca.pem, which cannot be used"):
        publishing.publish(REPORT, {}, settings(gitlab, tls, ci_server_tls_ca_file=file))


def test_https_where_http_is_served_is_an_error_at_once(gitlab: GitLabEmulator) -> None:
    with Front(gitlab.url) as front:
        found = settings(gitlab, front)
        assert found.ci_api_v4_url is not None
        wrong = found.model_copy(update={"ci_api_v4_url": found.ci_api_v4_url.replace("http:", "https:")})
        began = time.monotonic()
        with pytest.raises(UserError, match="no certificate that is trusted.*Check the address"):
            publishing.publish(REPORT, {}, wrong)
    assert time.monotonic() - began < 5  # s


def test_comment_of_a_gitlab_below_a_path_goes_to_that_path_and_says_so(gitlab: GitLabEmulator) -> None:
    with Front(gitlab.url, "/gitlab") as front:
        found = settings(gitlab, front)
        said = publishing.publish(REPORT + "\n\n![p](a.png)", {"a.png": b"\x89PNG\r\n\x1a\n"}, found)
        assert said.endswith(tuple("0123456789")) and f": {front.url}/" in said
        assert front.asked and all(path.startswith("/gitlab/api/v4/") for path in front.asked)


def test_only_the_servers_address_is_enough_below_a_path(gitlab: GitLabEmulator) -> None:
    with Front(gitlab.url, "/gitlab") as front:
        found = settings(gitlab, front, ci_server_url=front.url).model_copy(update={"ci_api_v4_url": None})
        assert found.api_url == f"{front.url}/api/v4"
        assert publishing.publish(REPORT, {}, found).startswith("python-gitlab created")
