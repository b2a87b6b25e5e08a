"""What the jobs call beside the package: .ci/code_quality.py and .ci/build_image.sh; and the comment of a failed job."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.report.failure import compose, failed_jobs, last_lines
from ml.report.publish import read_report
from ml.settings import Settings
from tests.conftest import ROOT
from tests.gitlab_emulator import GitLabEmulator
from tests.gitlab_emulator.rendering import effects


def code_quality(
    folder: Path, *command: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    program = [sys.executable, str(ROOT / ".ci" / "code_quality.py"), "report.json", *command]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    return done, json.loads((folder / "report.json").read_text())


def test_code_quality_lists_what_each_linter_finds_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import os\nx: int = 'a'\ny  =  1\n")
    (tmp_path / "Makefile").write_text(
        "all: a b c\na:\n\tblack --check .\nb:\n\tmypy --no-incremental bad.py\nc:\n\tpyflakes bad.py\n"
    )
    done, found = code_quality(tmp_path, "make", "--keep-going", "all")
    assert done.returncode == 2 and "would reformat" in done.stdout + done.stderr
    places = {(each["check_name"], each["location"]["path"], each["location"]["lines"]["begin"]) for each in found}  # type: ignore[index]
    assert places == {
        ("black", "bad.py", 1),
        ("types and names", "bad.py", 2),
        ("types and names", "bad.py", 1),
    }
    assert len({each["fingerprint"] for each in found}) == len(found)
    assert {each["severity"] for each in found} == {"minor", "major"}


def test_code_quality_report_is_empty_and_green_when_nothing_is_found(tmp_path: Path) -> None:
    done, found = code_quality(tmp_path, "echo", "All done!")
    assert (done.returncode, found) == (0, [])


def test_fingerprint_stays_when_a_finding_only_moves(tmp_path: Path) -> None:
    first = code_quality(tmp_path, "echo", "src/a.py:3:1: 'os' imported but unused")[1]
    moved = code_quality(tmp_path, "echo", "src/a.py:9:1: 'os' imported but unused")[1]
    assert first[0]["fingerprint"] == moved[0]["fingerprint"]


# ---- The image. BuildKit itself cannot run here: a stand-in records how it is called.

STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > arguments
cp "$DOCKER_CONFIG/config.json" config.json 2>/dev/null
cp "${SSL_CERT_FILE:-/dev/null}" trusted.pem
while [ $# -gt 0 ]; do
  if [ "$1" = --metadata-file ]; then
    echo '{"containerimage.config.digest": "sha256:bad", "containerimage.digest": "sha256:0a1b2c"}' > "$2"
  fi
  shift
done
"""


def build(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "buildctl-daemonless.sh").write_text(STAND_IN)
    (folder / "bin" / "buildctl-daemonless.sh").chmod(0o755)
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "CI_COMMIT_SHA": "c" * 40} | variables
    environment |= {"CI_COMMIT_TIMESTAMP": "2026-01-02T03:04:05Z"}
    command = ["sh", str(ROOT / ".ci" / "build_image.sh"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


REGISTRY = {
    "CI_REGISTRY": "registry.example.com",
    "CI_REGISTRY_USER": "ci",
    "CI_REGISTRY_PASSWORD": 'se"cret',
}
MODEL = {"MODEL_TAG": "model-v1.0.0", "MODEL_SHA256": "a" * 64, "DATA_HASH": "d.dir"}


def test_serving_image_is_built_with_the_released_model_and_handed_on_by_digest(tmp_path: Path) -> None:
    done = build(tmp_path, "serve", "registry.example.com/g/p:model-v1.0.0", **REGISTRY, **MODEL)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    for name, value in (MODEL | {"REVISION": "c" * 40}).items():
        assert f"build-arg:{name}={value}" in arguments
    assert "target=serve" in arguments
    assert any("name=registry.example.com/g/p:model-v1.0.0,push=true" in each for each in arguments)
    assert (tmp_path / "image.env").read_text() == "IMAGE=registry.example.com/g/p@sha256:0a1b2c\n"
    assert 'se"cret' not in done.stdout + done.stderr
    assert signed_in(tmp_path) == 'ci:se"cret'


def signed_in(folder: Path) -> str:
    [entry] = json.loads((folder / "config.json").read_text())["auths"].values()
    return base64.b64decode(entry["auth"]).decode()


def caches(folder: Path, kind: str) -> list[str]:
    """The tags that --import-cache or --export-cache names."""
    arguments = (folder / "arguments").read_text().splitlines()
    following = [arguments[at + 1] for at, argument in enumerate(arguments) if argument == f"--{kind}-cache"]
    return [re.search(r"ref=([^,]+)", value)[1].rpartition(":")[2] for value in following]  # type: ignore[index]


@pytest.mark.parametrize("pasted", ["glpat-1", "glpat-1\n", " glpat-1 \r\n"])
def test_where_the_release_token_is_seen_it_signs_in(tmp_path: Path, pasted: str) -> None:
    """By the role of whoever merged, a job token could not push a protected image tag."""
    done = build(tmp_path, "ci", "registry.example.com/g/p/ci:main", **REGISTRY, RELEASE_TOKEN=pasted)
    assert done.returncode == 0, done.stderr
    assert signed_in(tmp_path) == "release-token:glpat-1"
    assert "glpat" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("target", "variables", "read", "written"),
    [
        ("ci", {}, ["cache-protected"], ["cache-protected"]),
        (
            "ci",
            {"CI_MERGE_REQUEST_IID": "3"},
            ["cache-protected", "cache-merge-requests"],
            ["cache-merge-requests"],
        ),
        # between two protected branches, as GitLab 18 may call it
        (
            "ci",
            {"CI_MERGE_REQUEST_IID": "3", "CI_COMMIT_REF_PROTECTED": "true"},
            ["cache-protected", "cache-merge-requests"],
            ["cache-merge-requests"],
        ),
        ("serve", MODEL, [], []),
    ],
)
def test_no_cache_that_merge_requests_write_is_read_elsewhere_and_production_has_none(
    tmp_path: Path, target: str, variables: dict[str, str], read: list[str], written: list[str]
) -> None:
    done = build(tmp_path, target, "registry.example.com/g/p/ci:some", **REGISTRY, **variables)
    assert done.returncode == 0, done.stderr
    assert (caches(tmp_path, "import"), caches(tmp_path, "export")) == (read, written)


def test_registry_behind_a_private_authority_is_trusted_beside_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "usual.pem").write_text("usual\n")
    (tmp_path / "private.pem").write_text("private\n")
    variables = {"SSL_CERT_FILE": "usual.pem", "CI_SERVER_TLS_CA_FILE": "private.pem"}
    assert build(tmp_path, "ci", "r/p/ci:main", **variables).returncode == 0
    assert (tmp_path / "trusted.pem").read_text() == "usual\nprivate\n"


def test_image_build_stops_at_a_missing_variable_and_at_an_unknown_target(tmp_path: Path) -> None:
    missing = build(
        tmp_path, "serve", "r/p:t", **{name: MODEL[name] for name in ("MODEL_TAG", "MODEL_SHA256")}
    )
    assert missing.returncode != 0 and "DATA_HASH" in missing.stderr
    unknown = build(tmp_path, "ship", "r/p:t")
    assert unknown.returncode == 2 and "ci or serve" in unknown.stderr
    assert not (tmp_path / "image.env").exists()


def test_build_arguments_are_those_of_the_dockerfile() -> None:
    script, dockerfile = (ROOT / ".ci/build_image.sh").read_text(), (ROOT / "Dockerfile").read_text()
    named = {part.split("=")[0] for part in script.split("build-arg:")[1:]}
    assert named == {"TORCH_INDEX", "MODEL_TAG", "MODEL_SHA256", "DATA_HASH", "REVISION", "CREATED"}
    assert all(f"ARG {name}" in dockerfile for name in named)


# ---- The comment when a job failed


@pytest.fixture
def gitlab() -> "object":
    with GitLabEmulator() as emulator:
        emulator.add_merge_request()
        yield emulator


def settings_of(gitlab: GitLabEmulator, pipeline: int, **more: object) -> Settings:
    return Settings(
        ci_api_v4_url=f"{gitlab.url}/api/v4",
        ci_project_id=gitlab.project.id,
        ci_pipeline_id=pipeline,
        repo_token=gitlab.token,
        **more,
    )


def test_comment_of_a_failed_job_has_the_end_of_its_log(gitlab: GitLabEmulator) -> None:
    pipeline = gitlab.add_pipeline(jobs={"preflight": {}, "pipeline": {}}, status="running")["id"]
    first, second = gitlab.project.jobs[pipeline]
    first.status, second.status = "success", "failed"
    second.trace = (
        "section_start:1:step_script\r\x1b[0K\x1b[32mRunning\x1b[0m\n"
        + "".join(f"line {number}\n" for number in range(100))
        + "error: the loss of seed 1 is not finite at step 20.\nUploading artifacts...\n"
    )
    [job] = failed_jobs(settings_of(gitlab, pipeline))
    assert (job.name, job.reason, len(job.log)) == ("pipeline", "script_failure", 25)
    text = compose([job], "a" * 40, f"{gitlab.url}/g/proj/-/pipelines/{pipeline}")
    assert text.splitlines()[0] == "## ❌ No result: `pipeline` failed"
    assert "`error: the loss of seed 1 is not finite at step 20.`" in text and "Uploading" not in text


# By gitlab-runner's timestamper (common/buildlogger/internal), as its documentation describes the form.
TIME = "2026-01-02T03:04:05.000678Z"


def stamped(writes: list[tuple[str, str]]) -> str:
    """The log of a runner ≥ 18.7 after `writes` of (stream, text): a line ends at a line break, and is cut at a \\r."""
    log, started, cut = "", dict[str, str](), dict[str, str]()
    for stream, text in writes:
        for part in re.findall(r"[^\n]*\n|[^\n]+", text):
            started[stream] = started.get(stream, "") + part
            if part.endswith("\n") or "\r" in part:
                log += f"{TIME} {stream}{cut.pop(stream, ' ')}{started.pop(stream).removesuffix(chr(10))}\n"
                if not part.endswith("\n"):
                    cut[stream] = "+"
    return log + "".join(f"{TIME} {stream}{cut.get(stream, ' ')}{rest}\n" for stream, rest in started.items())


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (f"{TIME} 01E error: no such data\n", ["error: no such data"]),
        (f"{TIME} 01O \x1b[32mok\x1b[0m\n{TIME} 00O ERROR: Job failed\n", ["ok", "ERROR: Job failed"]),
        (f"{TIME} 01O 10 %\r\n{TIME} 01O+20 %\r\n{TIME} 01O+done\n", ["done"]),
        # another stream's line in between
        (f"{TIME} 01O 10 %\r\n{TIME} 01E warning\n{TIME} 01O+done\n", ["done", "warning"]),
        (f"{TIME} 00O section_start:1:step_script\r\x1b[0KRunning\n", ["Running"]),
        (f"{TIME} 00O section_start:1:a\r\x1b[0K\n{TIME} 00O+section_end:2:a\r\x1b[0K\n", []),
        ("section_start:1:step_script[collapsed=true]\r\x1b[0K\x1b[36mRunning\x1b[0m\n", ["Running"]),
        # with and without, as when a runner was upgraded, or a program prints another one's log
        (f"plain\n{TIME} 01O stamped\nplain again\n", ["plain", "stamped", "plain again"]),
        (f"a\r\n{TIME} 01O windows\r\n", ["a", "windows"]),
        (f"{TIME} 01O+goes on with nothing\n", ["goes on with nothing"]),
        (
            "2026-01-02 is a date\n2026-01-02T03:04:05Z too\n",
            ["2026-01-02 is a date", "2026-01-02T03:04:05Z too"],
        ),
        ("", []),
    ],
)
def test_end_of_a_log_is_what_the_job_said_with_and_without_times(log: str, expected: list[str]) -> None:
    assert last_lines(log) == expected


LINE = st.text(
    st.characters(codec="utf-8", exclude_characters="\n\x1b", exclude_categories=("Cs",)), max_size=20
)


@given(st.lists(st.tuples(LINE, st.booleans()), max_size=12), st.lists(st.integers(0, 200), max_size=6))
def test_times_and_cuts_of_the_runner_change_nothing_in_what_is_shown(
    lines: list[tuple[str, bool]], cuts: list[int]
) -> None:
    plain = "".join(f"\x1b[0;m{line}\n" if coloured else f"{line}\n" for line, coloured in lines)
    edges = [0, *sorted(min(cut, len(plain)) for cut in cuts), len(plain)]
    writes = [("01O", plain[start:end]) for start, end in zip(edges, edges[1:])]
    assert last_lines(stamped(writes)) == last_lines(plain)


@given(st.lists(st.tuples(st.sampled_from(["00O", "01O", "01E"]), LINE), max_size=12))
def test_each_stream_of_a_log_keeps_its_own_lines(writes: list[tuple[str, str]]) -> None:
    stamp = re.compile(r"\d{4}-\d\d-\d\dT")
    shown = last_lines(stamped([(stream, f"{text}\n") for stream, text in writes]))
    assert not any(stamp.match(line) for line in shown)
    assert shown == last_lines("".join(f"{text}\n" for _, text in writes))


def test_log_of_a_failed_job_can_do_nothing_in_the_comment(tmp_path: Path) -> None:
    hostile = "```\n\n/merge\n/approve\n@all !1 #1 ![x](http://evil.example/x.png) <script>\n`\n/close\n"
    hostile += (
        "deadbeefcafe g/proj@deadbeefcafe `#ff0000` $x$ ~bug %1 &1 [wiki] :smile: http://evil.example\n"
    )
    job_log = last_lines(hostile)
    from ml.report.failure import FailedJob

    text = compose([FailedJob("/merge `x`", "@all", "javascript:1", job_log)], "a" * 40, None)
    (tmp_path / "comment.md").write_text(text)
    assert read_report(tmp_path / "comment.md") == text.strip("\n")  # refuses quick actions
    assert effects(text).found() == {"commits": ["aaaaaaaa"]}  # the one that it is about


def test_without_a_token_or_an_answer_the_comment_links_to_the_pipeline(gitlab: GitLabEmulator) -> None:
    assert failed_jobs(Settings(repo_token=None, gitlab_token=None)) == []
    assert failed_jobs(settings_of(gitlab, 4711)) == []  # no such pipeline: 404
    text = compose([], "a" * 40, "https://gitlab.example.com/g/p/-/pipelines/7")
    assert "the pipeline failed" in text and "(https://gitlab.example.com/g/p/-/pipelines/7)" in text
