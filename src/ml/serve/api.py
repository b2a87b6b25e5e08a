"""The framework's side: the OpenAPI schema of all routes, and the routes that are called seldom.

`ml.serve.front` answers the others before they come here; they are declared all the same, so that /docs and generated
clients know them.
"""

import math
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from fastapi import Security
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from ml.bundle import TAG, Experiment, check_tag
from ml.errors import UserError
from ml.serve.live_model import Returned, Swap, replace_model, roll_back
from ml.serve.model import Refused
from ml.serve.problems import MEDIA_TYPE, Problem
from ml.serve.state import Busy
from ml.serve.store.base import Listing, NotFound, Unavailable, open_store

if TYPE_CHECKING:
    from ml.serve.front import Front

NOSNIFF = "x-content-type-options"  # the front sends it with every answer
TAG_PATTERN = f"^(?:{TAG.pattern})$"


class ProblemDetails(BaseModel):
    """RFC 9457. More members may follow, such as `check`, `errors`, `error_code`."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(examples=["urn:problem:unknown-format"])]
    title: Annotated[str, Field(examples=["Unsupported Media Type"])]
    status: Annotated[int, Field(ge=400, le=599)]
    detail: Annotated[str, Field(examples=["Found bytes that begin with 47 49 46 38. Send PNG, JPEG, …"])]
    request_id: str | None = None


class ImageFacts(BaseModel):
    format: Annotated[str, Field(examples=["PNG"])]
    width: int
    height: int
    mode: Annotated[str, Field(examples=["RGBA"], description="colour mode, as Pillow calls it")]


class Prediction(BaseModel):
    file: Annotated[str, Field(examples=["3.png"], description="its name in the form; empty for a raw body")]
    class_: Annotated[str, Field(alias="class", examples=["3"])]
    probability: Annotated[float, Field(examples=[0.9983])]
    probabilities: dict[str, float]
    image: ImageFacts
    done: Annotated[list[str], Field(examples=[["inverted", "resized from 280×280 to 28×28"]])]


class Predictions(BaseModel):
    model: Annotated[str, Field(examples=["model-v1.2.0"], description="tag of the model that answered")]
    predictions: list[Prediction]


class Ready(BaseModel):
    status: str
    model: str


class Invocation(BaseModel):
    predictions: Annotated[
        list[list[float]], Field(description="probability of each class, for each example")
    ]


class Replacement(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tag: Annotated[
        str,
        Field(pattern=TAG_PATTERN, max_length=100, examples=["model-v1.2.0"]),
        AfterValidator(check_tag),
    ]
    sha256: Annotated[
        str | None, Field(pattern="^[0-9a-f]{64}$", description="of model.onnx: refused when it differs")
    ] = None
    dry_run: Annotated[bool, Field(description="fetch and check, but leave the old model live")] = False


class Rollback(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dry_run: bool = False


class Meta(BaseModel):
    tag: str
    git_commit: str
    created: datetime
    dataset: str
    data_hash: str
    lock_sha256: str
    model_sha256: str
    class_names: list[str]
    metrics: dict[str, Any]
    params: dict[str, Any]
    aliases: list[str]
    live: bool


class Unreadable(BaseModel):
    tag: str
    reason: str


class Metas(BaseModel):
    live: str
    total: int
    page: int
    per_page: int
    experiments: list[Meta]
    unreadable: list[Unreadable]


class MetasQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sort: Annotated[
        str,
        Field(
            pattern=r"^-?(tag|created|git_commit|dataset|metrics\.[A-Za-z0-9_]{1,60})$",
            description="tag, created, git_commit, dataset or metrics.NAME; `-` first for descending",
            examples=["-metrics.accuracy"],
        ),
    ] = "-created"
    page: Annotated[int, Field(ge=1, le=100_000)] = 1
    per_page: Annotated[int, Field(ge=1, le=100)] = 20
    tag: Annotated[str | None, Field(max_length=100, description="part of the tag")] = None
    commit: Annotated[
        str | None, Field(pattern="^[0-9a-f]{4,64}$", description="beginning of the commit")
    ] = None
    dataset: Annotated[str | None, Field(max_length=100)] = None
    live: bool | None = None


CURLS = {
    "/predict": "curl -F file=@3.png -F file=@7.jpg $URL/predict\ncurl --data-binary @3.png -H 'Content-Type: image/png' $URL/predict",
    "/invocations": """python3 -c 'import json; print(json.dumps({"inputs": [[[0] * WIDTH] * HEIGHT]}))' \\
  | curl -H 'Content-Type: application/json' -d @- $URL/invocations""",
    "/get_experiments_metas": 'curl "$URL/get_experiments_metas?sort=-metrics.accuracy&per_page=5"',
    "/replace_ml_model": """curl -H "Authorization: Bearer $SERVE_TOKEN" -H 'Content-Type: application/json' \\
  -d '{"tag": "model-v1.2.0"}' $URL/replace_ml_model""",
    "/rollback_ml_model": 'curl -X POST -H "Authorization: Bearer $SERVE_TOKEN" $URL/rollback_ml_model',
    **{path: f"curl $URL{path}" for path in ("/ping", "/health", "/ready", "/version", "/metrics")},
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    return {status: {"description": "Problem details", "content": content} for status in statuses}


IMAGE_TYPES = ("image/png", "image/jpeg", "image/bmp", "image/webp", "application/octet-stream")
BINARY = {"type": "string", "format": "binary"}
PREDICT_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "array", "items": BINARY}},
                "required": ["file"],
            }
        },
        **{kind: {"schema": BINARY} for kind in IMAGE_TYPES},
    },
}


def invocations_body(experiment: Experiment) -> dict[str, Any]:
    example = [[[0] * experiment.image_width] * experiment.image_height]
    number = {"type": "integer", "minimum": 0, "maximum": 255}
    return {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "description": "exactly one of inputs, instances, dataframe_split and dataframe_records",
                    "properties": {
                        "inputs": {"type": "array", "items": {"type": "array", "items": {}}},
                        "instances": {"type": "array", "items": {"type": "array", "items": {}}},
                        "dataframe_split": {"type": "object"},
                        "dataframe_records": {"type": "array", "items": {"type": "object"}},
                    },
                    "minProperties": 1,
                },
                "examples": {"inputs": {"summary": "one black image", "value": {"inputs": example}}},
            },
            "text/csv": {"schema": {"type": "string"}, "example": number and "p0,p1,…\n0,255,…\n"},
        },
    }


def build_api(front: "Front") -> FastAPI:
    """Raises nothing of the store's: it is opened here, and asked only by the routes that need it."""
    live, settings, board = front.live, front.settings, front.telemetry.board
    state = live.state
    store = open_store(settings, state.folder / "cache")
    app = FastAPI(
        title="Every merge request is an experiment: the live model",
        version=version("ml"),
        description="Every answer carries X-Model-Tag, the model that made it, and X-Request-ID. Errors are RFC 9457 problem details.",
        docs_url=None,
        redoc_url=None,
        responses=problems(500, 503),
    )
    declare_front_routes(app, live.batcher.model.experiment)
    bearer = Security(HTTPBearer(auto_error=False, description="SERVE_TOKEN"))

    @app.get("/get_experiments_metas", responses=problems(422, 502), tags=["experiments"])
    def get_experiments_metas(query: Annotated[MetasQuery, Query()]) -> Metas:
        """Every model of the store with its commit, date, data hash, metrics and params; which one is live."""
        pointer = state.read()
        return select(store.listing(), query, pointer.tag if pointer else live.batcher.model.tag)

    def count(swap: Swap) -> Swap:
        if not swap.dry_run:
            live.telemetry.count("model_swaps_total", "done" if swap.changed else "already_live")
        return swap

    @app.post(
        "/replace_ml_model",
        responses=problems(400, 401, 403, 404, 408, 409, 413, 422, 502),
        tags=["experiments"],
        dependencies=[bearer],
    )
    def replace_ml_model(body: Annotated[Replacement, Body()]) -> Swap:
        """Fetch a model of the store by its tag, check it, and make it live in every worker of this server.

        Answers when it is live everywhere. A model that fails a check changes nothing (422, `check` names the check).
        """
        return count(replace_model(state, store, board, body.tag, body.sha256, body.dry_run))

    @app.post(
        "/rollback_ml_model",
        responses=problems(400, 401, 403, 404, 408, 409, 413, 422),
        tags=["experiments"],
        dependencies=[bearer],
    )
    def rollback_ml_model(body: Annotated[Rollback, Body()] = Rollback()) -> Swap:
        """Make the model live again that was live before this one."""
        return count(roll_back(state, board, body.dry_run))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        from ml.serve.docs import HEADERS, docs_page

        return HTMLResponse(docs_page(app.openapi(), live.batcher.model.tag), headers=HEADERS)

    @app.get("/", include_in_schema=False)
    def drawing() -> Response:
        from ml.serve.page import page

        experiment = live.batcher.model.experiment
        body, headers = page(experiment.image_height, experiment.image_width)
        return Response(body, headers={name: value for name, value in headers.items() if name != NOSNIFF})

    add_problem_handlers(app, front)
    return app


def declare_front_routes(app: FastAPI, experiment: Experiment) -> None:
    def elsewhere() -> Response:
        raise AssertionError("ml.serve.front answers this route")

    def declare(method: str, path: str, summary: str, text: str, **more: Any) -> None:
        app.add_api_route(
            path,
            elsewhere,
            methods=[method],
            summary=summary,
            description=text,
            operation_id=path.strip("/"),
            **more,
        )

    declare(
        "POST",
        "/predict",
        "Class and probabilities of one image or many",
        "Files of a form, or one as the body: PNG, JPEG, BMP, WebP, IDX or .npy (both uint8, one image or many), of any "
        "size and colour mode. What had to be done to fit the model is in `done`.",
        response_model=Predictions,
        responses=problems(400, 408, 413, 415, 422),
        tags=["predictions"],
        openapi_extra={
            "requestBody": PREDICT_BODY,
            "parameters": [
                {
                    "name": "invert",
                    "in": "query",
                    "description": "auto inverts an image with a light border when the model's own have a dark one",
                    "schema": {"type": "string", "enum": ["auto", "never", "always"], "default": "auto"},
                }
            ],
        },
    )
    declare(
        "POST",
        "/invocations",
        "As MLflow's scoring server",
        "inputs, instances, dataframe_split, dataframe_records, or text/csv: raw pixels 0…255 as (examples, height, width) "
        "or a row of pixels for each example.",
        response_model=Invocation,
        responses=problems(400, 408, 413, 415),
        tags=["predictions"],
        openapi_extra={"requestBody": invocations_body(experiment)},
    )
    declare("GET", "/ping", "As MLflow's scoring server", "200 when a model is loaded.", tags=["operation"])
    declare("GET", "/health", "Liveness", "200 while the server can answer at all.", tags=["operation"])
    declare(
        "GET",
        "/ready",
        "Readiness",
        "503 while the server shuts down: send it nothing new.",
        response_model=Ready,
        tags=["operation"],
    )
    for path, summary in (("/version", "Version of this software"), ("/metrics", "Numbers for Prometheus")):
        kinds = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Text"}}
        declare("GET", path, summary, summary, response_class=Response, responses=kinds, tags=["operation"])
    default = app.openapi

    def size(text: str) -> str:
        return text.replace("WIDTH", str(experiment.image_width)).replace(
            "HEIGHT", str(experiment.image_height)
        )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = default()
            schema["components"]["schemas"]["ProblemDetails"] = ProblemDetails.model_json_schema()
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["x-codeSamples"] = [
                        {"lang": "Shell", "label": "curl", "source": size(CURLS[path])}
                    ]
                    operation["responses"].pop("422" if path in ("/invocations",) else "", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    setattr(app, "openapi", openapi)


def select(listing: Listing, query: MetasQuery, live: str) -> Metas:
    """Filter, sort and cut one page. Raises Problem when no experiment has the metric to sort by."""
    found = [
        each
        for each in listing.experiments
        if (query.tag is None or query.tag in each.tag)
        and (query.commit is None or each.git_commit.startswith(query.commit))
        and (query.dataset is None or query.dataset == each.dataset)
        and (query.live is None or query.live == (each.tag == live))
    ]
    descending, key = query.sort.startswith("-"), query.sort.removeprefix("-")
    found.sort(key=lambda each: each.tag)
    if key.startswith("metrics."):
        name = key.removeprefix("metrics.")
        known = sorted({metric for each in listing.experiments for metric in each.metrics})
        if listing.experiments and name not in known:
            raise Problem(
                422, "unknown-metric", f"No experiment has the metric {name!r}; there are {', '.join(known)}."
            )
        values = {each.tag: number(each.metrics.get(name)) for each in found}
        without = [each for each in found if values[each.tag] is None]  # last, whichever way
        found = [each for each in found if values[each.tag] is not None]
        found.sort(key=lambda each: values[each.tag] or 0.0, reverse=descending)
        found += without
    else:
        found.sort(key=lambda each: getattr(each, key), reverse=descending)
    first = (query.page - 1) * query.per_page
    return Metas(
        live=live,
        total=len(found),
        page=query.page,
        per_page=query.per_page,
        experiments=[
            meta(each, live, listing.aliases.get(each.tag, []))
            for each in found[first : first + query.per_page]
        ],
        unreadable=[Unreadable(tag=tag, reason=reason) for tag, reason in sorted(listing.unreadable.items())],
    )


def number(metric: Any) -> float | None:
    """The value of a metric, or its mean where there are several seeds."""
    if isinstance(metric, dict):
        metric = metric.get("mean")
    try:
        found = float(metric) if isinstance(metric, int | float) else math.nan
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def meta(experiment: Experiment, live: str, aliases: list[str]) -> Meta:
    return Meta(
        **{name: getattr(experiment, name) for name in Meta.model_fields if hasattr(experiment, name)},
        model_sha256=experiment.model.sha256,
        aliases=aliases,
        live=experiment.tag == live,
    )


def as_problem(error: Exception) -> Problem:
    """What an exception of this package, or of the framework, is to a client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Refused):
        return Problem(422, "model-refused", str(error), check=error.check)
    if isinstance(error, NotFound):
        return Problem(404, "model-not-found", str(error))
    if isinstance(error, Busy):
        return Problem(409, "change-under-way", str(error), {"Retry-After": "1"})
    if isinstance(error, Unavailable):
        return Problem(502, "store-unavailable", str(error), {"Retry-After": "10"})
    if isinstance(error, Returned):
        return Problem(503, "returned-to-old-model", str(error), {"Retry-After": "10"})
    if isinstance(error, UserError):
        return Problem(502, "store-unavailable", str(error))
    if isinstance(error, RequestValidationError):
        errors = [
            {"at": ".".join(map(str, each["loc"])), "problem": each["msg"]} for each in error.errors()[:20]
        ]  # without the input: it may be a secret
        return Problem(
            422,
            "bad-request",
            "; ".join(f"{each['at']}: {each['problem']}" for each in errors),
            errors=errors,
        )
    if isinstance(error, StarletteHTTPException):
        return Problem(error.status_code, "http", str(error.detail), dict(error.headers or {}))
    raise error


def add_problem_handlers(app: FastAPI, front: "Front") -> None:
    async def answer(request: Request, error: Exception) -> Response:
        problem = as_problem(error)
        if problem.kind == "bad-request" and "json" not in request.headers.get("content-type", "json"):
            problem.detail += ". Send the header Content-Type: application/json"
        front.telemetry.count("errors_total", problem.kind)
        if request.url.path in ("/replace_ml_model", "/rollback_ml_model") and not isinstance(
            error, RequestValidationError
        ):
            front.telemetry.count("model_swaps_total", problem.kind)
            front.telemetry.log("warning", "swap_refused", problem=problem.kind, detail=problem.detail[:500])
        body = problem.body(request.scope.get("request_id", ""))
        return Response(body, problem.status, problem.headers, MEDIA_TYPE)

    for kind in (Problem, UserError, RequestValidationError, HTTPException, StarletteHTTPException):
        app.add_exception_handler(kind, answer)
