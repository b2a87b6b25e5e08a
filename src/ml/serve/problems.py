"""Errors as RFC 9457 problem details: one shape for this code's, the framework's and the protocol's."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """An answer that is an error. `detail` says what was found and the remedy; it is read by strangers: no secrets.

    Args:
        kind: short name of the problem, the last part of its `type`; docs/serving.md lists them.
        headers: more headers of the answer, such as Retry-After.
        members: more members of the document.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {})
        self.members = members

    def body(self, request_id: str = "") -> bytes:
        document = {
            "type": f"urn:problem:{self.kind}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            **({"request_id": request_id} if request_id else {}),
            **self.members,
        }
        return json.dumps(document).encode()


def busy(detail: str) -> Problem:
    """More requests than this worker takes: come again in a second."""
    return Problem(503, "busy", detail, {"Retry-After": "1"})
