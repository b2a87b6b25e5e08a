"""A handle for tests: `with GitLabEmulator() as gitlab:` serves an emulated GitLab from a background thread."""

import asyncio
import base64
import copy
import dataclasses
import json
import os
import re
import socket
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any, Literal, Self

import uvicorn

from tests.gitlab_emulator.app import App
from tests.gitlab_emulator.faults import DROP, Fault, Faults
from tests.gitlab_emulator.git import prepare, sync
from tests.gitlab_emulator.protection import refused_image
from tests.gitlab_emulator.rights import DEVELOPER, Tier
from tests.gitlab_emulator.state import MergeRequest, Note, QuickAction, State, User

SECRETS = ("trigger_token", "registration_token", "token", "value")  # fields that no dump has
REVIEWER = User(2, "bob", "Bob")


class GitLabEmulator:
    """One project, `g/proj`, with a token of each kind, on a free port of this machine.

    What GitLab refuses depends on its `tier` and `version`; it is refused here as well (rights.py, protection.py).

    `project` and `state` are the live objects; `notes`, `quick_actions` and `requests` are copies, taken at once.
    """

    DROP = DROP

    def __init__(
        self,
        port: int = 0,
        host: str = "127.0.0.1",
        path: str = "g/proj",
        tier: Tier = "free",
        version: str = "18.6",
        runner: str = "18.7",
        **token_values: str,
    ) -> None:
        self._kind: dict[str, Any] = {"tier": tier, "version": version, "runner": runner}
        self.app = App(State(tier, version, runner), Faults())
        self.reset(path, **token_values)
        self._socket = _listening(host, port)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self.app, log_level="critical", lifespan="off", ws="none", http="h11", loop="asyncio"
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )

    def reset(self, path: str = "g/proj", token: str = "", job_token: str = "") -> None:
        """Start anew with an empty project and new tokens, so that tests can share one server.

        `token` is a Reporter's with scope `api`, `read_token` one with `read_api`; `job_token` is the CI_JOB_TOKEN of a
        pipeline that a Developer started.
        """
        self.state = self.app.state = State(**self._kind)
        self.faults = self.app.faults = Faults()
        self.project = self.state.add_project(path, 64)
        self.token = self.state.add_token(self.project, "api", value=token).value
        self.read_token = self.state.add_token(self.project, "read_api").value
        self.job_token = self.state.add_token(self.project, "job", DEVELOPER, value=job_token).value

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the emulator's server ended before it was ready")
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = self._server.force_exit = True  # open connections are not waited for
        self._thread.join()
        self._socket.close()

    # ---- Setting up

    def add_merge_request(self, iid: int = 3, **fields: Any) -> MergeRequest:
        return self.state.add_merge_request(self.project, iid=iid, **fields)

    def add_note(self, iid: int, body: str, author: User = REVIEWER, system: bool = False) -> Note:
        return self.state.add_note(self.project.merge_requests[iid], body, author, system)

    def add_repository(self, folder: Path) -> str:
        """Keep the project's code in a bare repository at `folder`, made where there is none; its address."""
        prepare(self.project, folder)
        return f"{self.url}/{self.project.path}.git"

    def add_pipeline(
        self,
        iid: int = 3,
        jobs: dict[str, dict[str, bytes]] | None = None,
        status: str = "success",
        kind: Literal["head", "merge", "train"] = "head",
        sha: str = "",
    ) -> dict[str, Any]:
        """A pipeline of the merge request that has ended; `jobs` are the artifacts of each, by path.

        `kind`: of its head, its merged result or its merge train, each a ref of its own; `sha` is what that ran on.
        """
        with self.state.lock:
            sync(self.project)
            sha = sha or self.project.merge_requests[iid].sha
            ref = f"refs/merge-requests/{iid}/{kind}"
            return self.state.add_pipeline(self.project, ref, sha, status, "merge_request_event", jobs or {})

    def push_image(self, image: str, token: str) -> None:
        """Push `g/proj/name:tag` to the project's registry, as `docker push` does with the token.

        Raises PermissionError with the client's words where it, or GitLab's registry, refuses.
        """
        repository, _, tag = image.partition(":")
        if repository != repository.lower():
            raise PermissionError("invalid reference format: repository name must be lowercase")
        with self.state.lock:
            known = self.state.tokens.get(token)
            rules = self.project.protected_container_tags
            if (
                known is None
                or not known.scopes & {"api", "write_registry", "job"}
                or not f"{repository}/".startswith(f"{self.project.path.lower()}/")
                or refused_image(tag, known.access_level, rules)
            ):
                raise PermissionError("denied: requested access to the resource is denied")
            registry = self.project.registry
            kept = next((found for found in registry.values() if found["path"] == repository), None)
            if kept is None:
                name = repository.removeprefix(self.project.path.lower()).strip("/")
                kept = {"id": self.state.new_id(), "name": name, "path": repository, "tags": []}
                registry[kept["id"]] = kept
            location = {"name": tag, "path": image, "location": f"registry.example/{image}"}
            kept["tags"] = [other for other in kept["tags"] if other["name"] != tag] + [location]

    def fail_next(
        self,
        status: int,
        times: int = 1,
        *,
        method: str | None = None,
        path: str = "",
        retry_after: str | None = None,
        applied: bool = False,
    ) -> None:
        """Answer the next `times` requests whose path contains the pattern `path` with `status`, or DROP them.

        With `applied` the request is carried out all the same: only its answer gets lost.
        """
        self.faults.add(Fault(status, times, method, re.compile(path), retry_after, applied))

    def environment(self, iid: int | None = 3, **more: str) -> dict[str, str]:
        """The variables of a job in the merge request's pipeline, as GitLab sets them."""
        variables = {
            "CI": "true",
            "GITLAB_CI": "true",
            "CI_SERVER_URL": self.url,
            "CI_API_V4_URL": f"{self.url}/api/v4",
            "CI_PROJECT_ID": str(self.project.id),
            "CI_PROJECT_PATH": self.project.path,
            "CI_PROJECT_URL": f"{self.url}/{self.project.path}",
            "CI_JOB_TOKEN": self.job_token,
        }
        if iid is not None:
            merge_request = self.project.merge_requests[iid]
            variables |= {
                "CI_PIPELINE_SOURCE": "merge_request_event",
                "CI_COMMIT_SHA": merge_request.sha,
                "CI_MERGE_REQUEST_IID": str(iid),
                "CI_MERGE_REQUEST_PROJECT_ID": str(self.project.id),
                "CI_MERGE_REQUEST_PROJECT_URL": f"{self.url}/{self.project.path}",
                "CI_MERGE_REQUEST_SOURCE_PROJECT_ID": str(merge_request.source_project_id),
            }
        return variables | more

    # ---- Looking

    def notes(self, iid: int = 3) -> list[Note]:
        """Oldest first, system notes among them."""
        with self.state.lock:
            return copy.deepcopy(
                sorted(self.project.merge_requests[iid].notes.values(), key=lambda note: note.id)
            )

    @property
    def quick_actions(self) -> list[QuickAction]:
        with self.state.lock:
            return list(self.state.quick_actions)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """method, path (undecoded) and status of every request answered, oldest first."""
        with self.state.lock:
            return list(self.state.requests)

    def page_url(self, iid: int = 3) -> str:
        return f"{self.url}/{self.project.path}/-/merge_requests/{iid}"

    def dump(self, path: Path) -> None:
        """Write all that the server has received as JSON, bytes as base64; tokens are left out."""
        with self.state.lock:
            tree = {
                "projects": [_plain(dataclasses.asdict(project)) for project in self.state.projects.values()],
                "quick_actions": [dataclasses.asdict(action) for action in self.state.quick_actions],
                "requests": list(self.state.requests),
            }
        written = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        written.write_text(json.dumps(tree, indent=1), encoding="utf-8")
        written.replace(path)


class _Server(uvicorn.Server):
    async def main_loop(self) -> None:
        """uvicorn looks every 0.1 s whether it is to end; hundreds of tests shall not wait that long."""
        while not self.should_exit:
            await asyncio.sleep(0.005)


def _listening(host: str, port: int) -> socket.socket:
    """A socket whose protocol is given: only then asyncio sets TCP_NODELAY, else an answer takes 40 ms."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen()
    return listening


def _plain(node: Any) -> Any:
    """`node` with keys and values that JSON knows."""
    if isinstance(node, dict):
        return {
            " ".join(map(str, key)) if isinstance(key, tuple) else str(key): _plain(value)
            for key, value in node.items()
            if key not in SECRETS
        }
    if isinstance(node, date):
        return node.isoformat()
    if isinstance(node, list | tuple | frozenset):
        return [_plain(item) for item in node]
    if isinstance(node, Path):
        return str(node)
    return base64.b64encode(node).decode() if isinstance(node, bytes) else node
