"""The API, asked of a real server."""

import gzip
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving import DIGITS, ROOT, TOKEN, Served, hostile_models, make_images, png, served

pytest_plugins = ["tests.serving_fixtures"]

IMAGES = make_images(20)


@pytest.fixture(scope="module")
def server(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One worker, model-v1.0.0; the tests that change the model put it back."""
    with served(
        bundles, tmp_path_factory.mktemp("state"), MODEL_TAG="model-v1.0.0", SERVE_TIMEOUT="3"
    ) as found:
        yield found


def idx(array: "np.ndarray[Any, Any]") -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def is_problem(answer: Any, status: int, kind: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == status and document["type"].startswith("urn:problem:") and document["detail"]
    assert document["request_id"] == answer.headers["x-request-id"]
    assert kind is None or document["type"] == f"urn:problem:{kind}"
    return document  # type: ignore[no-any-return]


def test_predict_answers_class_probabilities_and_model(server: Served) -> None:
    answer = server.post("/predict", files={"file": ("3.png", png(IMAGES[3]), "image/png")})
    assert answer.status_code == 200 and answer.headers["x-model-tag"] == "model-v1.0.0"
    document = answer.json()
    (one,) = document["predictions"]
    assert document["model"] == "model-v1.0.0" and one["file"] == "3.png" and one["class"] == "3"
    assert list(one["probabilities"]) == DIGITS and sum(one["probabilities"].values()) == pytest.approx(
        1, abs=1e-4
    )
    assert one["probability"] == max(one["probabilities"].values())
    assert one["image"] == {"format": "PNG", "width": 28, "height": 28, "mode": "L"} and one["done"] == []


def test_predict_agrees_with_invocations_for_every_way_of_sending(server: Served) -> None:
    rows = server.post("/invocations", json={"inputs": IMAGES.tolist()}).json()["predictions"]
    ways = [
        server.post("/predict", files=[("file", (f"{i}.png", png(image))) for i, image in enumerate(IMAGES)]),
        server.post("/predict", data=idx(IMAGES), headers={"content-type": "application/octet-stream"}),
        server.post(
            "/predict",
            files=[("files", ("all.idx", idx(IMAGES[:10]))), ("files", ("b.idx", idx(IMAGES[10:])))],
        ),
    ]
    for answer in ways:
        found = [list(each["probabilities"].values()) for each in answer.json()["predictions"]]
        assert np.allclose(found, rows, atol=1e-5)


def test_predict_tells_what_it_did_to_the_picture(server: Served) -> None:
    large = np.kron(255 - IMAGES[4], np.ones((5, 5), np.uint8))
    (one,) = server.post("/predict", files={"file": ("<4>.bmp", png(large, "BMP"))}).json()["predictions"]
    assert one["class"] == "4" and one["done"] == ["inverted", "resized from 140×140 to 28×28"]
    assert one["file"] == "<4>.bmp" and one["image"]["format"] == "BMP"
    (one,) = server.post("/predict?invert=never", data=png(large)).json()["predictions"]
    assert "inverted" not in one["done"]
    is_problem(server.post("/predict?invert=perhaps", data=png(large)), 422, "bad-parameter")
    is_problem(server.post("/predict?top=3", data=png(large)), 422, "bad-parameter")


@pytest.mark.parametrize(
    "data, headers, status",
    [
        (b"", {}, 415),
        (b"no image", {"content-type": "image/png"}, 415),
        (b"{}", {"content-type": "application/json"}, 415),
        (png(IMAGES[0])[:50], {"content-type": "image/png"}, 422),
        (b"--x--", {"content-type": "multipart/form-data; boundary=x"}, 422),
        (b"x", {"content-type": "multipart/form-data"}, 422),
        (idx(np.zeros((2000, 1, 1), np.uint8)), {}, 413),
        (bytes(10 * 2**20 + 1), {}, 413),
        (
            b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
            + struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
            + bytes(100),
            {},
            422,
        ),
    ],
)
def test_bad_upload_is_a_problem_within_200_ms(
    server: Served, data: bytes, headers: dict[str, str], status: int
) -> None:
    server.post("/predict", data=png(IMAGES[0], "BMP"))
    started = time.perf_counter()
    answer = server.post("/predict", data=data, headers=headers)
    assert time.perf_counter() - started < 1.0  # 0.2 on a quiet machine: see benchmarks/reliability_serve.py
    is_problem(answer, status)


def test_body_that_says_it_is_too_long_is_refused_before_it_is_sent(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), 10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in connection.recv(1000)
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), 10) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
        answer = b""
        try:
            for _ in range(40):  # endless: the server has to end it
                connection.sendall(chunk)
        except OSError:
            pass
        try:
            answer = connection.recv(1000)
        except ConnectionError:
            return
    assert b" 413 " in answer


@pytest.mark.parametrize(
    "start",
    [b"POST /predict HTT", b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc", b""],
)
def test_half_sent_request_is_ended_after_the_time_limit(server: Served, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), 10) as connection:
        connection.sendall(start)
        began = time.monotonic()
        answer = connection.recv(1000)
        assert b" 408 " in answer and b"problem+json" in answer
        assert 1 < time.monotonic() - began < 8


def test_endless_headers_and_broken_http_are_refused(server: Served) -> None:
    address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
    with socket.create_connection(address, 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        try:
            for number in range(3000):
                connection.sendall(b"X-%d: " % number + b"a" * 100 + b"\r\n")
        except OSError:
            pass
        try:
            assert b" 431 " in connection.recv(1000)
        except ConnectionError:
            pass
    with socket.create_connection(address, 10) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        answer = connection.recv(1000)
        assert b" 400 " in answer and b"problem+json" in answer


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": IMAGES[:2].tolist()},
        {"inputs": {"images": IMAGES[:2].tolist()}},
        {"instances": IMAGES[:2].tolist()},
        {"instances": [{"images": image.tolist()} for image in IMAGES[:2]]},
        {"inputs": IMAGES[:2].reshape(2, -1).tolist()},
        {"dataframe_split": {"columns": list(range(784)), "data": IMAGES[:2].reshape(2, -1).tolist()}},
        {
            "dataframe_split": {
                "index": [0, 1],
                "columns": ["images"],
                "data": [[i.tolist()] for i in IMAGES[:2]],
            }
        },
        {"dataframe_records": [{str(n): v for n, v in enumerate(i.ravel().tolist())} for i in IMAGES[:2]]},
        {"inputs": IMAGES[:2].astype(float).tolist(), "params": {"a": 1}, "unknown": 2},
    ],
)
def test_invocations_takes_what_mlflow_takes(server: Served, body: dict[str, Any]) -> None:
    answer = server.post("/invocations", json=body)
    assert answer.status_code == 200, answer.text
    rows = np.array(answer.json()["predictions"])
    assert rows.shape == (2, 10) and rows.argmax(1).tolist() == [0, 1] and answer.headers["x-model-tag"]


def test_invocations_takes_csv(server: Served) -> None:
    lines = [",".join(map(str, range(784)))] + [",".join(map(str, image.ravel())) for image in IMAGES[:3]]
    answer = server.post(
        "/invocations", data="\n".join(lines), headers={"content-type": "text/csv; charset=utf-8"}
    )
    assert np.array(answer.json()["predictions"]).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "data, status",
    [
        ("{", 400),
        ("[1]", 400),
        ("{}", 400),
        ('{"inputs": [[[1]]], "instances": []}', 400),
        ('{"inputs": []}', 400),
        ('{"inputs": [[1, 2], [3]]}', 400),
        ('{"inputs": [["a"]]}', 400),
        ('{"inputs": [[null]]}', 400),
        ('{"inputs": 7}', 400),
        ('{"inputs": [[NaN]]}', 400),
        (json.dumps({"inputs": [[0.5] * 784]}), 400),
        (json.dumps({"inputs": [[256] * 784]}), 400),
        (json.dumps({"inputs": [[-1] * 784]}), 400),
        (json.dumps({"inputs": [[10**400] * 784]}), 400),
        (json.dumps({"inputs": [[True] * 784]}), 400),
        (json.dumps({"dataframe_split": {"columns": ["a"], "data": [[1, 2]]}}), 400),
        (json.dumps({"dataframe_records": [{"a": 1}, {"b": 1}]}), 400),
        ("[" * 100_000, 400),
        (json.dumps({"inputs": [[0] * 784] * 1025}), 413),
    ],
)
def test_invocations_refuses_as_mlflow_does(server: Served, data: str, status: int) -> None:
    document = is_problem(
        server.post("/invocations", data=data, headers={"content-type": "application/json"}), status
    )
    if status == 400:
        assert document["error_code"] in ("BAD_REQUEST", "INVALID_PARAMETER_VALUE") and document["message"]


def test_invocations_refuses_other_content_types(server: Served) -> None:
    def refused(**headers: str) -> str:
        document = is_problem(server.post("/invocations", data=b"x", headers=headers), 415)
        assert document["message"] == document["detail"]
        return str(document["detail"])

    for kind in ("text/plain", "application/vnd.apache.parquet", ""):
        detail = refused(**{"content-type": kind} if kind else {})
        assert f"Got {kind!r}" in detail and "application/json" in detail and "text/csv" in detail
    assert "only supports UTF-8" in refused(**{"content-type": "application/json; charset=latin-1"})


def test_mlflows_own_client_understands_the_answers(server: Served) -> None:
    client = pytest.importorskip("mlflow.pyfunc.scoring_server.client")
    host, _, port = server.address.removeprefix("http://").partition(":")
    asked = client.ScoringServerClient(host, int(port))
    asked.wait_server_ready(timeout=5)
    assert re.match(r"\d", asked.get_version())
    found = asked.invoke(IMAGES[:4]).get_predictions(dtype="float32")
    assert found.shape == (4, 10) and found.to_numpy().argmax(1).tolist() == [0, 1, 2, 3]
    with pytest.raises(Exception, match="Invocation failed .error code 400"):
        asked.invoke(np.zeros((1, 3)))


def test_metas_are_sorted_paged_and_filtered(server: Served) -> None:
    def tags(query: str) -> list[str]:
        answer = server.get(f"/get_experiments_metas?{query}")
        assert answer.status_code == 200, answer.text
        return [each["tag"] for each in answer.json()["experiments"]]

    old, new = "model-v1.0.0", "model-v1.1.0"
    assert tags("") == [new, old] and tags("sort=created") == [old, new]
    assert tags("sort=-metrics.accuracy") == [old, new] and tags("sort=metrics.accuracy") == [new, old]
    assert tags("per_page=1") == [new] and tags("per_page=1&page=2") == [old] and tags("page=3") == []
    assert tags("live=true") == [old] and tags("live=false") == [new]
    assert tags("tag=v1.1") == [new] and tags("commit=0123456") == [new, old] and tags("commit=ffff") == []
    assert tags("dataset=bars") == [new, old] and tags("dataset=other") == []
    document = server.get("/get_experiments_metas").json()
    one = document["experiments"][1]
    assert (document["live"], document["total"], one["live"]) == (old, 2, True)
    assert one["git_commit"].startswith("0123") and one["created"].startswith("2026-01-01")
    assert one["metrics"] == {"accuracy": {"mean": 0.97}} and one["params"] == {"train": {"epochs": 1}}
    assert len(one["model_sha256"]) == 64 and one["data_hash"] and one["lock_sha256"]


@pytest.mark.parametrize(
    "query",
    [
        "page=0",
        "page=x",
        "per_page=101",
        "per_page=-1",
        "sort=size",
        "sort=metrics.",
        "sort=metrics.loss",
        "commit=xyz",
        "live=perhaps",
        "unknown=1",
        "sort=-created;drop",
    ],
)
def test_metas_refuse_bad_parameters(server: Served, query: str) -> None:
    name = query.partition("=")[0]
    named = "the metric 'loss'" if query == "sort=metrics.loss" else f"query.{name}: "
    assert named in is_problem(server.get(f"/get_experiments_metas?{query}"), 422)["detail"]


def test_model_is_replaced_and_rolled_back(server: Served) -> None:
    answer = server.swap("model-v1.1.0")
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert (document["tag"], document["previous"], document["changed"]) == (
        "model-v1.1.0",
        "model-v1.0.0",
        True,
    )
    assert document["checks"] == ["files", "size", "sha256", "shapes", "finite", "golden"]
    answer = server.post("/predict", data=png(IMAGES[3]))
    assert answer.json()["model"] == answer.headers["x-model-tag"] == "model-v1.1.0"
    assert server.get("/get_experiments_metas?live=true").json()["experiments"][0]["tag"] == "model-v1.1.0"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert (
        server.post("/rollback_ml_model", json={"dry_run": True}, headers=headers).json()["tag"]
        == "model-v1.0.0"
    )
    assert server.get("/ready").json()["model"] == "model-v1.1.0"
    assert server.post("/rollback_ml_model", headers=headers).json()["tag"] == "model-v1.0.0"
    assert server.get("/ready").json()["model"] == "model-v1.0.0"
    assert server.swap("model-v1.1.0", dry_run=True).json()["dry_run"] is True
    assert server.get("/ready").json()["model"] == "model-v1.0.0"
    assert server.metric("ml_serve_model_swaps_total", result="done") >= 2
    assert server.metric("ml_serve_model_info", tag="model-v1.0.0") == 1
    assert server.metric("ml_serve_model_info", tag="model-v1.1.0") == 0


@pytest.mark.parametrize(
    "body, status",
    [
        ({}, 422),
        ({"tag": 7}, 422),
        ({"tag": "model-v9"}, 404),
        ({"tag": "../../etc"}, 422),
        ({"tag": "a" * 101}, 422),
        ({"tag": "a..b"}, 422),
        ({"tag": "model-v1.1.0\n"}, 422),
        ({"tag": "model-v1.1.0", "sha256": "0" * 64}, 422),
        ({"tag": "model-v1.1.0", "sha256": "x"}, 422),
        ({"tag": "model-v1.1.0", "dry_run": "yes"}, 422),
        ({"tag": "model-v1.1.0", "more": 1}, 422),
        ([], 422),
    ],
)
def test_bad_replacement_changes_nothing(server: Served, body: Any, status: int) -> None:
    answer = server.post("/replace_ml_model", json=body, headers={"Authorization": f"Bearer {TOKEN}"})
    is_problem(answer, status)
    assert server.get("/ready").json()["model"] == "model-v1.0.0"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer \xff",
    ],
)
def test_without_the_token_nothing_is_even_read(server: Served, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/replace_ml_model", "/rollback_ml_model"):
        answer = server.post(path, data=b"\x00 not json", headers=headers)
        assert is_problem(answer, 401)["type"] == "urn:problem:unauthorized"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_no_token_configured_means_nobody_may(bundles: Path, tmp_path: Path) -> None:
    with served(bundles, tmp_path, SERVE_TOKEN="") as server:
        live = server.get("/ready").json()["model"]
        other = next(tag for tag in ("model-v1.0.0", "model-v1.1.0") if tag != live)
        is_problem(server.swap(other), 403, "no-token-configured")
        is_problem(server.swap(other, token=""), 403, "no-token-configured")
        for header in ({}, {"Authorization": f"Bearer {TOKEN}"}, {"Authorization": "Bearer "}):
            is_problem(server.post("/rollback_ml_model", headers=header), 403, "no-token-configured")
        assert server.get("/ready").json()["model"] == live


def test_unknown_routes_and_methods_are_problems(server: Served) -> None:
    is_problem(server.get("/nothing"), 404)
    is_problem(server.get("/predict/"), 404)
    for path, allowed in (("/predict", "POST"), ("/replace_ml_model", "POST"), ("/invocations", "POST")):
        answer = server.get(path)
        is_problem(answer, 405)
        assert answer.headers["allow"] == allowed
    answer = server.post("/health")
    is_problem(answer, 405)
    is_problem(server.session.request("PROPFIND", server.address + "/predict", timeout=10), 405)
    assert server.session.head(server.address + "/health", timeout=10).status_code == 200


def test_liveness_readiness_and_pages_answer(server: Served) -> None:
    for path in ("/health", "/ready", "/ping", "/version", "/docs", "/openapi.json", "/", "/metrics"):
        answer = server.get(path)
        assert answer.status_code == 200 and answer.headers["x-model-tag"] == "model-v1.0.0", path
    docs = server.get("/docs").text
    for path in ("/predict", "/invocations", "/get_experiments_metas", "/replace_ml_model"):
        assert path in docs
    assert (
        "http://" not in re.sub(r"curl[^<]*", "", docs) and "https://" not in docs
    )  # loads nothing from elsewhere


def test_openapi_has_examples_and_problem_details_for_every_route(server: Served) -> None:
    schema = server.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/predict", "/invocations", "/ping", "/health", "/ready", "/version", "/metrics",
        "/get_experiments_metas", "/replace_ml_model", "/rollback_ml_model",
    }  # fmt: skip
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["summary"] and "curl" in "curl" in operation["x-codeSamples"][0]["source"]
            refused = [status for status in operation["responses"] if status >= "400"]
            assert refused and all(
                list(operation["responses"][status]["content"]) == ["application/problem+json"]
                for status in refused
            ), path
    assert "multipart/form-data" in schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert schema["components"]["schemas"]["Predictions"]["properties"]["model"]["examples"] == [
        "model-v1.2.0"
    ]


def test_request_id_is_taken_over_when_it_is_sane(server: Served) -> None:
    assert (
        server.get("/health", headers={"X-Request-ID": "abc-123_X.y"}).headers["x-request-id"]
        == "abc-123_X.y"
    )
    ids = {
        server.get("/health", headers={"X-Request-ID": bad}).headers["x-request-id"]
        for bad in ('"}', "a" * 65, "a b")
    }
    assert len(ids) == 3 and all(re.fullmatch(r"[0-9a-f]{12}-\d+", each) for each in ids)


def test_log_is_json_and_holds_neither_secrets_nor_content(server: Served) -> None:
    server.get("/health", headers={"X-Request-ID": "find-me"})
    server.get("/nothing?secret=hunter2-in-the-query")
    server.post("/predict", files={"hunter2-field": ("hunter2-name.png", b"hunter2-content")})
    server.swap("model-v1.1.0", token="hunter2-token")
    server.swap("../hunter2-tag")
    time.sleep(0.3)
    lines = [json.loads(line) for line in list(server.log)]
    found = [line for line in lines if line.get("id") == "find-me"]
    assert [(line["route"], line["status"], line["method"], line["model"]) for line in found] == [
        ("/health", 200, "GET", "model-v1.0.0")
    ]
    text = "".join(server.log)
    assert "hunter2" not in text and TOKEN not in text


def test_metrics_count_requests_predictions_scores_and_inputs(server: Served) -> None:
    names = [
        ("ml_serve_requests_total", {"route": "/predict", "status": "200"}, 3),
        ("ml_serve_request_seconds_count", {"route": "/predict"}, 4),
        ("ml_serve_errors_total", {"kind": "unknown-format"}, 1),
        ("ml_serve_predictions_total", {"predicted_class": "3"}, 3),
        ("ml_serve_score_count", {}, 3),
        ("ml_serve_input_brightness_count", {}, 3),
        ("ml_serve_input_contrast_count", {}, 3),
        ("ml_serve_input_ink_count", {}, 3),
        ("ml_serve_batch_images_sum", {}, 3),
        ("ml_serve_images_changed_total", {"what": "inverted"}, 1),
    ]
    before = [server.metric(name, **labels) for name, labels, _ in names]
    sums = {
        name: server.metric(f"ml_serve_{name}_sum") for name in ("score", "input_brightness", "input_ink")
    }
    answers = [
        server.post("/predict", data=png(image)).json() for image in (IMAGES[3], IMAGES[3], 255 - IMAGES[3])
    ]
    server.post("/predict", data=b"none")
    after = [server.metric(name, **labels) for name, labels, _ in names]
    assert [now - then for now, then in zip(after, before)] == [more for _, _, more in names]
    scores = sum(answer["predictions"][0]["probability"] for answer in answers)
    assert server.metric("ml_serve_score_sum") - sums["score"] == pytest.approx(scores, abs=1e-4)
    brightness = 3 * IMAGES[3].mean() / 255
    assert server.metric("ml_serve_input_brightness_sum") - sums["input_brightness"] == pytest.approx(
        brightness, abs=1e-4
    )
    ink = 3 * (IMAGES[3] >= 128).mean()
    assert server.metric("ml_serve_input_ink_sum") - sums["input_ink"] == pytest.approx(ink, abs=1e-4)
    assert server.metric("ml_serve_process_resident_bytes") > 2e7 and server.metric("ml_serve_in_flight") == 1


def test_metrics_are_what_prometheus_reads(server: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = {each.name: each for each in text_string_to_metric_families(server.get("/metrics").text)}
    assert (
        families["ml_serve_request_seconds"].type == "histogram"
        and families["ml_serve_requests"].type == "counter"
    )
    assert families["ml_serve_process_cpu_seconds"].type == "counter"


def test_hostile_models_are_refused_and_the_old_one_answers(bundles: Path, tmp_path: Path) -> None:
    import shutil

    models = Path(shutil.copytree(bundles, tmp_path / "models"))
    wanted = hostile_models(models, models / "model-v1.0.0")
    with served(models, tmp_path / "state", MODEL_TAG="model-v1.0.0") as server:
        for tag, check in wanted.items():
            document = is_problem(server.swap(tag), 422)
            assert document["check"] == check, tag
        assert server.post("/predict", data=png(IMAGES[3])).json()["model"] == "model-v1.0.0"
        listed = server.get("/get_experiments_metas?per_page=100").json()
        assert "no-json" in [each["tag"] for each in listed["unreadable"]]
        assert "linked-folder" not in json.dumps(listed)


def test_server_that_cannot_start_says_why(tmp_path: Path, bundles: Path) -> None:

    def run(**more: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"PORT": "0", "MODEL_STORE": str(bundles), "OMP_NUM_THREADS": "1"} | more
        return subprocess.run(
            [sys.executable, "-m", "ml.serve", "--check"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    good = run()
    assert (good.returncode, good.stdout) == (0, "model-v1.1.0\n"), good.stderr
    for environment, words in (
        ({"MODEL_STORE": str(tmp_path)}, "There is no model in"),
        ({"MODEL_TAG": "model-v9"}, "There is no model model-v9"),
        ({"PORT": "none"}, "PORT: "),
        ({"SERVE_TOKEN": "short"}, "SERVE_TOKEN must have at least 8 characters"),
        ({"MODEL_STORE": "s3://bucket"}, "is unknown"),
        ({"SERVE_MAX_MODEL": "10"}, "model.onnx has"),
    ):
        bad = run(**environment)
        assert bad.returncode == 1 and words in bad.stderr and "Traceback" not in bad.stderr, bad.stderr


def test_server_starts_without_what_only_other_jobs_need(modules_after: Callable[[str], set[str]]) -> None:
    loaded = modules_after(
        "import ml.serve.__main__, ml.serve.front, ml.serve.server, ml.serve.store.directory"
    )
    assert "uvicorn" in loaded
    assert (
        not {"torch", "mlflow", "pandas", "dvc", "onnx", "fastapi", "pydantic_settings", "ruamel.yaml"}
        & loaded
    )


def test_every_setting_route_and_metric_is_documented() -> None:
    from ml.serve import metrics
    from ml.serve.front import FRAMEWORK
    from ml.serve.settings import ServeSettings

    text = (ROOT / "docs" / "serving.md").read_text()
    named = set(re.findall(r"[A-Z][A-Z_]{2,}[A-Z]", text))
    hidden = {
        "MLFLOW_MODEL_NAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    }  # as …_PASSWORD, ?model=NAME
    assert {name.upper() for name in ServeSettings.model_fields} - hidden <= named
    for route in [
        *FRAMEWORK,
        "/predict",
        "/invocations",
        "/ping",
        "/health",
        "/ready",
        "/version",
        "/metrics",
    ]:
        assert f"{route}`" in text or f"$URL{route}" in text, route
    for name in [*metrics.COUNTERS, *metrics.GAUGES, *metrics.HISTOGRAMS]:
        assert name in text, name


def test_traces_are_sent_when_an_endpoint_is_set(bundles: Path, tmp_path: Path) -> None:
    import http.server
    import threading

    received: list[bytes] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{collector.server_port}"
    with served(
        bundles, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=address, OTEL_BSP_SCHEDULE_DELAY="200"
    ) as server:
        trace = "0af7651916cd43dd8448eb211c80319c"
        server.post(
            "/predict", data=png(IMAGES[3]), headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
        )
        deadline = time.monotonic() + 10
        while not any(bytes.fromhex(trace) in each for each in received) and time.monotonic() < deadline:
            time.sleep(0.05)
    collector.shutdown()
    collector.server_close()
    assert any(bytes.fromhex(trace) in each and b"POST /predict" in each for each in received)


def test_every_command_of_the_documentation_works_as_printed(server: Served, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    assert commands.count("curl") >= 12
    (tmp_path / "artifacts").mkdir()
    np.savez(tmp_path / "artifacts" / "golden.npz", images=IMAGES)
    count = commands.count("curl ")
    commands = commands.replace("http://localhost:8000", server.address)
    commands = commands.replace("curl ", "curl -sS -o /dev/null -w '%{http_code} ' ")
    commands = commands.replace("curl -sS -o /dev/null -w '%{http_code} ' -s ", "curl -s ")
    done = subprocess.run(
        ["bash", "-e"],
        input=commands,
        cwd=tmp_path,
        env=os.environ
        | {"SERVE_TOKEN": TOKEN, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["200"] * (count - 1)  # one asks for the tag
