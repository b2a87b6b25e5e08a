"""The environment: what a variable may hold, and that no value of one is ever shown."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from ml import settings as reporting
from ml.errors import UserError
from ml.serve import settings as serving
from ml.settings import CREDENTIAL_FILES, CREDENTIALS, Settings, load_settings
from ml.validation import Environment, Holds, check_environment

ROOT = Path(__file__).parents[1]
SECRET = "glpat-Zq7wXk3v"
UNSEEN = ["\n", "\r\n", "\t", "\u00a0", "\u200b", "\ufeff", "\u202e", "\u2028", "\x7f", "\x1b", "\udcff"]
BLANKS = ["\n", " ", "\t"]


def kind(settings: type[Environment], field: str) -> str:
    return next(
        (mark.kind for mark in settings.model_fields[field].metadata if isinstance(mark, Holds)), "value"
    )


def fields(settings: type[Environment], *without: str) -> list[str]:
    return [name.upper() for name in settings.model_fields if kind(settings, name) not in without]


def refusal(load: object, **environment: str) -> str:
    """The error of loading the settings in this environment and no other."""
    with mock.patch.dict(os.environ, environment, clear=True), pytest.raises(UserError) as raised:
        load()  # type: ignore[operator]
    return str(raised.value)


@given(
    st.sampled_from(fields(Settings, "text", "command")), st.sampled_from(UNSEEN), st.integers(0, len(SECRET))
)
def test_invisible_character_anywhere_is_refused_by_name_and_never_shown(
    name: str, unseen: str, at: int
) -> None:
    message = refusal(load_settings, **{name: SECRET[:at] + unseen + SECRET[at:]})
    assert name in message
    assert not any(part in message for part in (SECRET[:at], SECRET[at:]) if len(part) > 3)
    assert message.isprintable() or message.replace("\n", "").isprintable()


@given(st.sampled_from(fields(serving.ServeSettings)), st.sampled_from(UNSEEN), st.integers(0, len(SECRET)))
def test_serving_refuses_the_same_by_the_same_words(name: str, unseen: str, at: int) -> None:
    message = refusal(serving.load_settings, **{name: SECRET[:at] + unseen + SECRET[at:]})
    assert name in message
    assert not any(part in message for part in (SECRET[:at], SECRET[at:]) if len(part) > 3)


@pytest.mark.parametrize("name", fields(Settings, "text", "command"))
@pytest.mark.parametrize("blank", BLANKS)
def test_blank_around_a_value_is_refused_in_every_setting(name: str, blank: str) -> None:
    for value in (f"{SECRET}{blank}", f"{blank}{SECRET}", blank):
        message = refusal(load_settings, **{name: value})
        assert f"  {name}: " in message and SECRET not in message


@pytest.mark.parametrize("name", [*CREDENTIALS, *CREDENTIAL_FILES])
def test_credentials_that_libraries_read_themselves_are_checked_too(name: str) -> None:
    for value in (f"{SECRET}\n", f" {SECRET}", f"{SECRET[:6]}\u200b{SECRET[6:]}"):
        message = refusal(load_settings, **{name: value})
        assert f"  {name}: " in message and SECRET[6:] not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DVC_REMOTE_URL", "/srv/our data/dvc"),
        ("DVC_REMOTE_PASSWORD", "correct horse battery staple"),
        ("DVC_REMOTE_KEY_FILE", "/builds/my group/project.tmp/KEY"),
        ("DEPLOY_COMMAND", "set -e\n\tkubectl apply -f deploy.yaml\n"),
        ("CI_MERGE_REQUEST_LABELS", "a label\u200b, accept-regression "),
        ("CI_RUNNER_DESCRIPTION", " runner\u00a0of the Größen \udcff"),
        ("CI_JOB_NAME", "pipeline: [a, b]\n"),
        ("CI_DEFAULT_BRANCH", "größe"),
        ("GDRIVE_CREDENTIALS_DATA", '{"access_token": "a", "scopes": ["b c"]}'),
        ("MLFLOW_EXPERIMENT_NAME", "our experiment"),
    ],
)
def test_what_a_field_may_hold_is_taken(name: str, value: str) -> None:
    with mock.patch.dict(os.environ, {name: value}, clear=True):
        held = getattr(load_settings(), name.lower())
    shown = held.get_secret_value() if isinstance(held, SecretStr) else str(held)
    assert shown == value.replace("\udcff", "\ufffd")


@pytest.mark.parametrize("value", ["glpat–x", "„glpat“", "glpat-ключ"])
def test_token_that_no_header_can_carry_is_refused(value: str) -> None:
    assert "REPO_TOKEN: has a character that is not ASCII" in refusal(load_settings, REPO_TOKEN=value)


def test_invisible_character_in_a_command_is_refused_as_the_shell_would_take_it_for_a_letter() -> None:
    assert "no-break space" in refusal(load_settings, DEPLOY_COMMAND="kubectl\u00a0apply")
    assert "line break" in refusal(load_settings, DEPLOY_COMMAND="kubectl apply\r\n")


@pytest.mark.parametrize(
    "name", [*fields(Settings, *"value token line command text".split()), *CREDENTIAL_FILES]
)
@pytest.mark.parametrize(
    "content",
    [
        '{"type": "service_account"}',
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl\n",
        "host ssh-ed25519 AAAAC3Nz",
        "[default]\naws_access_key_id = a\n",
    ],
)
def test_content_where_a_file_is_meant_is_told_as_such(name: str, content: str) -> None:
    assert f"{name}: holds the content of a file" in refusal(load_settings, **{name: content})


def test_file_where_its_content_is_meant_is_told_as_such() -> None:
    message = refusal(load_settings, GDRIVE_CREDENTIALS_DATA="/builds/g/p.tmp/GDRIVE_CREDENTIALS_DATA")
    assert "holds the path of a file" in message and "type Variable" in message
    message = refusal(load_settings, GDRIVE_CREDENTIALS_DATA='{\n  "a": "b"\n}')
    assert "line break as character 2 of 14; write it in one line" in message


def test_all_bad_variables_are_named_at_once() -> None:
    message = refusal(
        load_settings, REPO_TOKEN="a\n", CI_JOB_ID="5 ", SERVE_URL="ftp://x", DVC_REMOTE_URL=" "
    )
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        "CI_JOB_ID",
        "DVC_REMOTE_URL",
        "REPO_TOKEN",
        "SERVE_URL",
    ]


def test_variables_that_are_no_settings_can_be_checked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "a\n")
    monkeypatch.setenv("OTHER_FILE", "{}")
    check_environment(["UNSET_KEY"])
    with pytest.raises(
        UserError, match="OTHER_KEY: has a line break at its end\n.*OTHER_FILE: holds the content"
    ):
        check_environment(["OTHER_KEY"], files=["OTHER_FILE"])


# ---- Every command

ARGUMENTS = {
    "ml.promote": ["status"],
    "ml.release.reproduce": ["HEAD"],
    "ml.serve.batch": ["--to", "predictions.csv", "."],
    "ml.tracking": ["flush"],
    "ml.tracking.project": ["train"],
    "ml.report.failure": ["--out", "failure.md"],
}


def commands() -> list[str]:
    """The modules whose `main` loads settings."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text()
        if "load_settings()" in text and re.search(r"^def main\(", text, re.MULTILINE):
            module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
            found.append(module.removesuffix(".__main__"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", commands())
def test_no_command_shows_a_secret_that_it_refuses(module: str, workplace: Path) -> None:
    settings = serving.ServeSettings if module.startswith("ml.serve") else reporting.Settings
    secrets = [
        name.upper() for name, field in settings.model_fields.items() if "SecretStr" in str(field.annotation)
    ]
    assert secrets
    environment = os.environ | dict.fromkeys(secrets, f"{SECRET}\n") | {"TRACKING": "off"}
    command = [sys.executable, "-m", module, *ARGUMENTS.get(module, [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in output and SECRET not in output, output
    for name in secrets:
        assert f"  {name}: has a line break at its end" in output
