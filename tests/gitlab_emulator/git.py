"""The bare repository behind a project: questions that the API asks of it, and git over HTTP as GitLab guards it.

`git http-backend`, which comes with git, speaks the protocol. A `pre-receive` hook turns away what protected branches and
tags do not allow (protection.py), a `post-receive` hook keeps a record of what came.
"""

import base64
import gzip
import os
import subprocess
import tempfile
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from tests.gitlab_emulator.protection import refused_push
from tests.gitlab_emulator.rights import DEVELOPER, REPORTER
from tests.gitlab_emulator.state import MergeRequest, Project, Push, State, Token

ZEROS = "0" * 40
RECEIVED = "gitlab-received"  # file in the repository: one line for each ref of a push by HTTP
SERVICES = ("info/refs", "git-upload-pack", "git-receive-pack")
CHANGES = ("create", "update", "rewrite", "delete")
DENIED = (
    "HTTP Basic: Access denied. If a password was provided for Git authentication, the password was incorrect or "
    "you're required to use a token instead of a password. If a token was provided, it was either incorrect, "
    "expired, or improperly scoped."
)
HIDDEN = "The project you were looking for could not be found or you don't have permission to view it."

# A push past the server (by path) has no user and may do anything. One refused ref refuses the whole push.
PRE_RECEIVE = """#!/bin/sh
[ -n "$GITLAB_USER" ] || exit 0
while read -r before after ref; do
    if [ "$after" = ZEROS ]; then change=delete
    elif [ "$before" = ZEROS ]; then change=create
    elif git merge-base --is-ancestor "$before" "$after" 2>/dev/null; then change=update
    else change=rewrite; fi
    while IFS= read -r line; do
        case "$line" in "$change $ref "*)
            echo "GitLab: ${line#"$change $ref "}" >&2
            exit 1 ;;
        esac
    done <<END
$GITLAB_REFUSALS
END
done
""".replace("ZEROS", ZEROS)

POST_RECEIVE = f"""#!/bin/sh
[ -n "$GITLAB_USER" ] || exit 0
options=""
number=0
while [ "$number" -lt "${{GIT_PUSH_OPTION_COUNT:-0}}" ]; do
    eval "options=\\"$options	$(printf '$GIT_PUSH_OPTION_%s' "$number")\\""
    number=$((number + 1))
done
while read -r before after ref; do
    echo "$ref	$before	$after	$GITLAB_USER	$GITLAB_KIND$options" >> {RECEIVED}
done
"""


def git(
    repository: Path, *arguments: str, check: bool = True, variables: dict[str, str] | None = None
) -> str:
    """Standard output of a git command on the repository; "" where it fails and `check` is off."""
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "GitLab"), ("EMAIL", "gitlab@localhost"))
    }
    done = subprocess.run(
        ["git", "-C", str(repository), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | identity | (variables or {}),
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
    for name, text in (("pre-receive", PRE_RECEIVE), ("post-receive", POST_RECEIVE)):
        hook = repository / "hooks" / name
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(text)
        hook.chmod(0o755)
    project.repository = repository


def sync(project: Project) -> list[Push]:
    """Bring open merge requests up to their source branches, as a push to GitLab does; what was pushed since, by HTTP."""
    repository = project.repository
    if repository is None:
        return []
    listed = git(repository, "for-each-ref", "--format=%(refname) %(objectname)", "refs/heads")
    heads = dict(line.split() for line in listed.splitlines())
    for merge_request in project.merge_requests.values():
        sha = heads.get(f"refs/heads/{merge_request.source_branch}")
        if merge_request.state != "opened" or merge_request.source_project_id != project.id or sha is None:
            continue
        if sha != merge_request.sha or not merge_request.commits:
            merge_request.sha = sha
            span = f"{merge_request.target_branch}..{sha}"
            merge_request.commits = git(repository, "rev-list", span, check=False).split()
            git(repository, "update-ref", f"refs/merge-requests/{merge_request.iid}/head", sha)
    received, known = repository / RECEIVED, len(project.pushes)
    for line in received.read_text().splitlines()[known:] if received.exists() else []:
        ref, before, after, username, kind, *options = line.split("\t")
        project.pushes.append(Push(ref, before, after, username, tuple(options), kind == "job"))
    return project.pushes[known:]


def file_at(repository: Path, ref: str, path: str) -> bytes | None:
    """The content of a file at a commit, branch or tag; None where there is none."""
    done = subprocess.run(["git", "-C", str(repository), "show", f"{ref}:{path}"], capture_output=True)
    return None if done.returncode else done.stdout


def commit_file(repository: Path, branch: str, path: str, content: bytes, message: str) -> tuple[str, str]:
    """Commit one file onto the branch, made where there is none: its commits before and after."""
    before = git(repository, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}", check=False)
    hashed = ["git", "-C", str(repository), "hash-object", "-w", "--stdin"]
    blob = subprocess.run(hashed, input=content, capture_output=True, check=True).stdout.decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": f"{folder}/index"}
        if before:
            git(repository, "read-tree", before, variables=index)
        entry = f"100644,{blob},{path}"
        git(repository, "update-index", "--add", "--cacheinfo", entry, variables=index)
        tree = git(repository, "write-tree", variables=index)
    after = git(repository, "commit-tree", tree, *(["-p", before] if before else []), "-m", message)
    git(repository, "update-ref", f"refs/heads/{branch}", after)
    return before or ZEROS, after


class Conflict(Exception):
    """Git cannot merge the branch."""


def merge(project: Project, merge_request: MergeRequest, squash: bool) -> tuple[str, str]:
    """Merge its head into its target: the merge commit and the squash commit, "" where there is none.

    Raises Conflict when it conflicts, or would need a rebase for a fast-forward.
    """
    repository, sha, branch = project.repository, merge_request.sha, merge_request.target_branch
    assert repository is not None
    tip = git(repository, "rev-parse", branch)
    forward = git(repository, "merge-base", tip, sha) == tip
    if project.merge_method == "ff" and not forward:
        raise Conflict
    tree = git(repository, "merge-tree", "--write-tree", tip, sha, check=False).partition("\n")[0]
    if not tree:
        raise Conflict
    squashed = git(repository, "commit-tree", tree, "-p", tip, "-m", merge_request.title) if squash else ""
    merged = ""
    if project.merge_method == "merge":
        text = (
            f"Merge branch '{merge_request.source_branch}' into '{branch}'\n\n{merge_request.title}\n\n"
            f"See merge request {project.path}!{merge_request.iid}"
        )
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
    if token is None or token.expired or token.revoked:
        return None
    if token.is_job and username != "gitlab-ci-token":
        return None
    return token


def abilities(token: Token) -> set[str]:
    """What its scopes allow over git, whatever its role: Gitlab::Auth#abilities_for_scopes."""
    if token.scopes & {"api", "write_repository", "job"}:
        return {"download", "push"}
    return {"download"} if "read_repository" in token.scopes else set()


def pushed_refs(body: bytes, encoding: str) -> list[str]:
    """The refs that a push wants to change: git's pkt-lines `<before> <after> <ref>`, up to the first flush."""
    data = gzip.decompress(body) if encoding == "gzip" else body
    refs = []
    while len(data) > 4 and (length := int(data[:4], 16)) > 4:
        command, data = data[4:length].partition(b"\0")[0], data[length:]
        refs.append(command.decode().split(" ", 2)[2].strip())
    return refs


def refusals(project: Project, token: Token, refs: list[str]) -> str:
    """A line for each change of each ref that the token's user may not make: `<change> <ref> <why>`."""
    rules = (project.protected_branches, project.protected_tags, project.default_branch)
    return "\n".join(
        f"{change} {ref} {why}"
        for ref in refs
        for change in CHANGES
        if (why := refused_push(ref, change, token.access_level, *rules)) is not None
    )


def refused(token: Token | None, project: Project, writes: bool) -> Response | None:
    """The answer to a git client that may not fetch, or not push at all: lib/gitlab/git_access.rb."""
    if token is None or ("push" if writes else "download") not in abilities(token):
        return _told(DENIED, 401, {"WWW-Authenticate": 'Basic realm="GitLab"'})
    if project.id not in token.project_ids:
        return _told(HIDDEN, 404)
    if writes and token.is_job and not project.job_token_may_push:
        return _told("You are not allowed to upload code.", 403)
    if writes and token.access_level < DEVELOPER:
        return _told("You are not allowed to push code to this project.", 403)
    if token.access_level < REPORTER:
        return _told("You are not allowed to download code from this project.", 403)
    return None


def _told(text: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """git shows a plain text as `remote: …`."""
    return Response(text, status, headers, "text/plain")


def serve(request: Request, body: bytes, project: Project, state: State, service: str) -> Response:
    """Answer one request of a git client. Blocks while git runs."""
    token = basic_token(request, state)
    writes = "git-receive-pack" in (service, request.query_params.get("service"))
    answer = refused(token, project, writes)
    if answer is not None:
        return answer
    assert token is not None
    encoding = request.headers.get("content-encoding", "")
    refs = pushed_refs(body, encoding) if service == "git-receive-pack" else []
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
        "HTTP_CONTENT_ENCODING": encoding,
        "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
        "REMOTE_USER": token.user.username,
        "REMOTE_ADDR": "127.0.0.1",
        "GITLAB_USER": token.user.username,
        "GITLAB_KIND": "job" if token.is_job else "user",
        "GITLAB_REFUSALS": refusals(project, token, refs),
        # of another user than the server's, as the repository of a test in a container may be
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": "*",
        "GIT_CONFIG_KEY_1": "receive.hideRefs",
        "GIT_CONFIG_VALUE_1": "refs/merge-requests",
    }
    done = subprocess.run(["git", "http-backend"], input=body, capture_output=True, env=environment)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
    status = int(headers.pop("Status", "200").split()[0])
    return Response(content, status, headers=headers)
