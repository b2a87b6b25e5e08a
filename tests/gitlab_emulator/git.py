"""The bare repository behind a project: questions that the API asks of it, and git over HTTP as GitLab guards it.

`git http-backend`, which comes with git, speaks the protocol. An `update` hook turns away what a protected branch does
not allow (doc/user/project/repository/branches/protected.md), a `post-receive` hook keeps a record of what came.
"""

import base64
import os
import subprocess
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from tests.gitlab_emulator.state import Project, Push, State, Token

ZEROS = "0" * 40
RECEIVED = "gitlab-received"  # file in the repository: one line for each ref of a push by HTTP
SERVICES = ("info/refs", "git-upload-pack", "git-receive-pack")
TAG_LEVEL = 30  # developers make tags

UPDATE = """#!/bin/sh
# ref, before, after; a push past the server (by path) has no level and may do anything
[ -n "$GITLAB_LEVEL" ] || exit 0
case "$1" in
refs/heads/*) needed=$(git config "gitlab.protected-${1#refs/heads/}.level" || echo 30) ;;
*) needed=30 ;;
esac
if [ "$GITLAB_LEVEL" -lt "$needed" ]; then
    echo "GitLab: You are not allowed to push code to protected branches on this project." >&2
    exit 1
fi
case "$1" in
refs/heads/*)
    if [ "$needed" -gt 30 ] && [ "$2" != ZEROS ] && ! git merge-base --is-ancestor "$2" "$3"; then
        echo "GitLab: You are not allowed to force push code to a protected branch on this project." >&2
        exit 1
    fi ;;
esac
""".replace("ZEROS", ZEROS)

POST_RECEIVE = f"""#!/bin/sh
[ -n "$GITLAB_LEVEL" ] || exit 0
options=""
number=0
while [ "$number" -lt "${{GIT_PUSH_OPTION_COUNT:-0}}" ]; do
    eval "options=\\"$options $(printf '$GIT_PUSH_OPTION_%s' "$number")\\""
    number=$((number + 1))
done
while read -r before after ref; do
    echo "$ref $before $after $GITLAB_USER$options" >> {RECEIVED}
done
"""


def git(repository: Path, *arguments: str, text: str | None = None, check: bool = True) -> str:
    """Standard output of a git command on the repository; "" where it fails and `check` is off."""
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "GitLab"), ("EMAIL", "gitlab@localhost"))
    }
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments],
        input=text,
        capture_output=True,
        text=True,
        env=os.environ | identity,
    )
    if done.returncode and check:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip() if done.returncode == 0 else ""


def prepare(project: Project, repository: Path) -> None:
    """Make `repository` the project's; it is made where there is none."""
    if not (repository / "HEAD").exists():
        repository.mkdir(parents=True, exist_ok=True)
        git(repository, "init", "--quiet", "--bare", f"--initial-branch={project.default_branch}")
    git(repository, "config", "http.receivepack", "true")
    git(repository, "config", "receive.advertisePushOptions", "true")
    for branch, level in project.protected.items():
        git(repository, "config", f"gitlab.protected-{branch}.level", str(level))
    for name, text in (("update", UPDATE), ("post-receive", POST_RECEIVE)):
        hook = repository / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(text)
        hook.chmod(0o755)
    project.repository = repository


def sync(project: Project) -> None:
    """Bring open merge requests up to their source branches, as a push to GitLab does, and read what was pushed."""
    repository = project.repository
    if repository is None:
        return
    listed = git(repository, "for-each-ref", "--format=%(refname) %(objectname)", "refs/heads")
    heads = dict(line.split() for line in listed.splitlines())
    for merge_request in project.merge_requests.values():
        sha = heads.get(f"refs/heads/{merge_request.source_branch}")
        if merge_request.state != "opened" or merge_request.source_project_id != project.id or sha is None:
            continue
        if sha != merge_request.sha or not merge_request.commits:
            merge_request.sha = sha
            span = f"{project.default_branch}..{sha}"
            merge_request.commits = git(repository, "rev-list", span, check=False).split()
            git(repository, "update-ref", f"refs/merge-requests/{merge_request.iid}/head", sha)
    received = repository / RECEIVED
    if received.exists():
        lines = received.read_text().splitlines()
        for line in lines[len(project.pushes) :]:
            ref, before, after, username, *options = line.split()
            project.pushes.append(Push(ref, before, after, username, tuple(options)))


class Conflict(Exception):
    """Git cannot merge the branch."""


def merge(project: Project, sha: str, iid: int, title: str, source: str, squash: bool) -> tuple[str, str]:
    """Merge `sha` into the default branch: the merge commit and the squash commit, "" where there is none.

    Raises Conflict when it conflicts, or would need a rebase for a fast-forward.
    """
    repository, branch = project.repository, project.default_branch
    assert repository is not None
    tip = git(repository, "rev-parse", branch)
    forward = git(repository, "merge-base", tip, sha) == tip
    if project.merge_method == "ff" and not forward:
        raise Conflict
    tree = git(repository, "merge-tree", "--write-tree", tip, sha, check=False).partition("\n")[0]
    if not tree:
        raise Conflict
    squashed = git(repository, "commit-tree", tree, "-p", tip, "-m", title) if squash else ""
    merged = ""
    if project.merge_method == "merge":
        text = f"Merge branch '{source}' into '{branch}'\n\n{title}\n\nSee merge request {project.path}!{iid}"
        merged = git(repository, "commit-tree", tree, "-p", tip, "-p", squashed or sha, "-m", text)
    git(repository, "update-ref", f"refs/heads/{branch}", merged or squashed or sha, tip)
    return merged, squashed


# ---- Over HTTP


def basic_token(request: Request, state: State) -> Token | None:
    """The token in the password of basic authentication; GitLab minds the user name only of a job token."""
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        username, _, password = base64.b64decode(encoded).decode().partition(":")
    except ValueError:
        return None
    token = state.tokens.get(password)
    if token is not None and token.scope == "job" and username != "gitlab-ci-token":
        return None
    return token


def serve(request: Request, body: bytes, project: Project, state: State, service: str) -> Response:
    """Answer one request of a git client. Blocks while git runs."""
    token = basic_token(request, state)
    if token is None or project.id not in token.project_ids or token.scope == "read_api":
        return Response(
            "HTTP Basic: Access denied.", 401, headers={"WWW-Authenticate": 'Basic realm="GitLab"'}
        )
    writes = "git-receive-pack" in (service, request.query_params.get("service"))
    if writes and token.scope == "job" and not project.job_token_may_push:
        return Response("You are not allowed to upload code.", 403)
    if writes and token.access_level < TAG_LEVEL:
        return Response("You are not allowed to push code to this project.", 403)
    assert project.repository is not None
    environment = {
        "PATH": os.environ["PATH"],
        "GIT_PROJECT_ROOT": str(project.repository),
        "GIT_HTTP_EXPORT_ALL": "1",
        "PATH_INFO": f"/{service}",
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": request.url.query,
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
        "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
        "REMOTE_USER": token.user.username,
        "REMOTE_ADDR": "127.0.0.1",
        "GITLAB_USER": token.user.username,
        "GITLAB_LEVEL": str(token.access_level),
        # of another user than the server's, as the repository of a test in a container may be
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
    }
    done = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=environment)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
    status = int(headers.pop("Status", "200").split()[0])
    return Response(content, status, headers=headers)
