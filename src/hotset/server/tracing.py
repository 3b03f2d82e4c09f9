"""OpenTelemetry traces, off unless asked for: one span per generation, by GenAI conventions."""

from collections.abc import Mapping
from typing import Any

from hotset import __version__
from hotset.errors import ConfigError

# What the access log calls it -> the attribute's name.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "engine_id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read_input_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "ttft_ms": "hotset.time_to_first_token_ms",
}


class Tracer:
    """Sends spans; continues the trace a request's `traceparent` header names.

    Args:
        provider: an OpenTelemetry `TracerProvider`.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("hotset", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to_collector(cls, endpoint: str) -> "Tracer":
        """Send to an OTLP/HTTP collector, such as `http://127.0.0.1:4318/v1/traces`.

        Raises:
            ConfigError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                "traces need OpenTelemetry, which is not installed; pip install 'hotset[otel]'"
            ) from error
        provider = TracerProvider(resource=Resource.create({"service.name": "hotset"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def record(
        self,
        headers: Mapping[bytes, bytes],
        route: str,
        request_id: str,
        start_ns: int,
        status: int,
        facts: Mapping[str, Any],
    ) -> None:
        """A request has ended: send its span."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        kind = "text_completion" if route == "/v1/completions" else "chat"
        carrier = {"traceparent": headers.get(b"traceparent", b"").decode("latin-1")}
        span = self._tracer.start_span(
            f"{route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=start_ns,
            attributes={
                "gen_ai.operation.name": kind,
                "http.route": route,
                "http.response.status_code": status,
                "hotset.request_id": request_id,
                **{name: facts[key] for key, name in _ATTRIBUTES.items() if key in facts},
            },
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Send the spans that are left."""
        self._provider.shutdown()
