"""OpenTelemetry, when OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra otel is installed: one span for each request."""

import time
from collections.abc import Callable, MutableMapping
from typing import Any

from ml.errors import UserError


def start_tracing(worker: int) -> Callable[..., None]:
    """What Front calls after each request. The exporter reads the standard OTEL_… variables."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        raise UserError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, and the packages for it are missing. "
            "Run `pip install '.[otel]'`, or unset it."
        ) from None
    resource = Resource.create({"service.name": "ml-serve", "service.instance.id": str(worker)})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    tracer = provider.get_tracer("ml.serve")
    propagator = TraceContextTextMapPropagator()

    def record(
        scope: MutableMapping[str, Any],
        route: str,
        method: str,
        status: int,
        seconds: float,
        tag: str,
        request_id: str,
    ) -> None:
        end = time.time_ns()
        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        span = tracer.start_span(
            f"{method} {route}",
            context=propagator.extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=end - int(seconds * 1e9),
            attributes={
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "ml.model.tag": tag,
                "ml.request.id": request_id,
            },
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        span.end(end)

    return record
