"""The ASGI application: API routes below /api/v4, uploaded files, the page of a merge request, and faults."""

import asyncio
import re
from typing import Any
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

# Importing these registers their routes.
from tests.gitlab_emulator import (
    access,
    git,
    issues,
    jobs,
    merge_requests,
    mlflow,
    pipelines,
    projects,
    releases,
    repository,
    runners,
)
from tests.gitlab_emulator.auth import UNAUTHORIZED, authenticate, authorize, find_project
from tests.gitlab_emulator.faults import DROP, Fault, Faults
from tests.gitlab_emulator.page import merge_request_page
from tests.gitlab_emulator.routing import ApiError, Call, answer, not_found, read_body, route
from tests.gitlab_emulator.starts import after_push
from tests.gitlab_emulator.state import Project, State

ROUTE_MODULES = (
    access,
    issues,
    jobs,
    merge_requests,
    mlflow,
    pipelines,
    projects,
    releases,
    repository,
    runners,
)

API = "/api/v4"
UPLOAD_OF_ID = re.compile(r"/-/project/(?P<project>\d+)/uploads/(?P<secret>[0-9a-f]{32})/(?P<file>[^/]+)")
UPLOAD_OF_PATH = re.compile(r"/(?P<project>.+)/uploads/(?P<secret>[0-9a-f]{32})/(?P<file>[^/]+)")
GIT = re.compile(rf"/(?P<project>.+)\.git/(?P<service>{'|'.join(git.SERVICES)})")
PAGE = re.compile(r"/(?P<project>.+)/-/merge_requests/(?P<iid>\d+)")


class App:
    def __init__(self, state: State, faults: Faults) -> None:
        self.state = state
        self.faults = faults

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        path = scope["raw_path"].decode("ascii")
        await request.body()  # taken in whole, so that a fault meets a client that has said everything
        fault = self.faults.take(request.method, path)
        response = await self.respond(request, path) if fault is None or fault.applied else None
        if fault is not None and fault.status == DROP:
            return await _drop(send)
        if fault is not None:
            response = _failed(fault)
        assert response is not None
        with self.state.lock:
            self.state.requests.append(
                {"method": request.method, "path": path, "status": response.status_code}
            )
        await response(scope, receive, send)

    async def respond(self, request: Request, path: str) -> Response:
        try:
            if path.startswith(f"{API}/"):
                return await self.api(request, path.removeprefix(API))
            match = GIT.fullmatch(path)
            if match is not None:
                return await self.repository(request, unquote(match["project"]), match["service"])
            with self.state.lock:
                return self.site(path)
        except ApiError as error:
            return JSONResponse(error.body, error.status)

    async def api(self, request: Request, path: str) -> Response:
        found, arguments = route.find(request.method, path)
        data, files, body = await read_body(request)
        with self.state.lock:
            call = Call(
                method=request.method,
                base_url=str(request.base_url).rstrip("/"),
                arguments=arguments,
                query=dict(request.query_params),
                data=data,
                files=files,
                body=body,
                headers=dict(request.headers),
                state=self.state,
                token=authenticate(request, self.state, found),
            )
            if "id" in arguments and found.right.public:
                call.project = self.project(arguments["id"])
            elif "id" in arguments:
                if call.token is None:
                    raise not_found("Project") if found.method in ("GET", "HEAD") else UNAUTHORIZED
                call.project = find_project(self.state, call["id"], call.token)
                authorize(self.state, call.project, call.token, found)
            elif call.token is None and not found.right.public:
                raise UNAUTHORIZED
            if "id" in arguments:
                self.catch_up(call.project)
            return answer(found.handler(call), request.method)

    async def repository(self, request: Request, name: str, service: str) -> Response:
        project = self.project(name)
        if project.repository is None:
            raise not_found()
        body = await request.body()
        answered = await asyncio.to_thread(git.serve, request, body, project, self.state, service)
        with self.state.lock:
            self.catch_up(project)
        return answered

    def catch_up(self, project: Project) -> None:
        for push in git.sync(project):
            after_push(self.state, project, push)

    def project(self, name: str) -> Project:
        project = self.state.find_project(name)
        if project is None:
            raise not_found("Project")
        return project

    def site(self, path: str) -> Response:
        """What a browser asks for, signed in or not: there is nothing to hide in a test."""
        match = UPLOAD_OF_ID.fullmatch(path) or UPLOAD_OF_PATH.fullmatch(path)
        if match is not None:
            project = self.project(unquote(match["project"]))
            return projects.served_upload(project, match["secret"], unquote(match["file"]))
        match = PAGE.fullmatch(path)
        if match is not None:
            project = self.project(unquote(match["project"]))
            if int(match["iid"]) in project.merge_requests:
                return merge_request_page(project.merge_requests[int(match["iid"])], project)
        raise not_found()


def _failed(fault: Fault) -> Response:
    """429 as doc/security/rate_limits.md words it; 502 as the proxy in front of GitLab does."""
    if fault.status == 429:
        response = Response("Retry later\n", 429, media_type="text/plain")
    else:
        response = Response(
            f"<html><title>GitLab is not responding ({fault.status})</title></html>", fault.status
        )
    if fault.retry_after is not None:
        response.headers["Retry-After"] = fault.retry_after
    return response


async def _drop(send: Any) -> None:
    """End the connection without a word. ASGI has no way to say so; uvicorn's `send` knows its transport."""
    send.__self__.transport.abort()
    while not send.__self__.disconnected:
        await asyncio.sleep(0)
