"""schemathesis makes requests from the OpenAPI schema: no answer is a fault, and all are as the schema says."""

from pathlib import Path

import pytest

from tests.serving import TOKEN, served

pytest_plugins = ["tests.serving_fixtures"]


def fuzz(address: str, cases: int, log: Path) -> int:
    """Exit code of schemathesis with `cases` a route; what it says goes to `log`."""
    import subprocess
    import sys

    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{address}/openapi.json"]
    command += [
        "--max-examples",
        str(cases),
        "--phases",
        "examples,coverage,fuzzing",
        "--seed",
        "1",
        "--no-color",
    ]
    command += [
        "--header",
        f"Authorization: Bearer {TOKEN}",
        "--request-timeout",
        "20",
        "--suppress-health-check",
        "all",
    ]
    command += [
        "--checks",
        "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
    ]
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent)
    return done.returncode


@pytest.mark.slow
def test_no_request_that_the_schema_allows_or_nearly_allows_is_a_fault(bundles: Path, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    with served(bundles, tmp_path / "state") as server:
        code = fuzz(server.address, 8, tmp_path / "log")
        text = (tmp_path / "log").read_text()
        assert code == 0, text[-6000:]
        assert server.metric("ml_serve_requests_total") > 300
        assert server.metric("ml_serve_requests_total", status="500") == 0
        assert not server.events("fault")
