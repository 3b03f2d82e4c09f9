"""From a request body to queued prompts: all of them or none."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from hotset.engine.output_stream import OutputStream
from hotset.engine.stream_service import StreamService
from hotset.errors import RequestError
from hotset.request import SamplingParams
from hotset.server.errors import ApiError
from hotset.server.keys import Tenant
from hotset.server.limits import Limits
from hotset.server.responses import Writer, make_writers
from hotset.server.schemas import GenerationRequest
from hotset.text.prompt import PromptEncoder
from hotset.text.repeats import ChatPrompt

BATCH_PRIORITY = 1  # after requests that a client waits for


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that the engine has: a stream per prompt, a writer per output."""

    body: GenerationRequest
    request_id: str
    num_prompt_tokens: int
    streams: Sequence[OutputStream]
    writers: Sequence[Writer]

    def abort(self) -> None:
        """Stop what has not ended."""
        for stream in self.streams:
            stream.abort()


class Admission:
    """Encodes requests, checks them against the limits and queues them. For any thread.

    Args:
        service: the engine.
        encoder: of its model.
        limits: of a request.
    """

    def __init__(self, service: StreamService, encoder: PromptEncoder, limits: Limits) -> None:
        self.service = service
        self.encoder = encoder
        self.limits = limits

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) where another model is asked for."""
        served = self.service.model.name
        if name not in (None, served):
            message = f"model {name!r} is not served here; {served!r} is"
            raise ApiError(404, message, code="model_not_found", param="model")

    def submit(
        self, body: GenerationRequest, tenant: Tenant, *, is_batch: bool = False
    ) -> Admitted:
        """Queue every prompt of a request. Prompts of a batch wait without bound, after all others.

        Raises:
            RequestError: it cannot be served; OverloadedError: too many wait; EngineError: the
                engine is gone. Nothing is queued then.
        """
        limits = self.limits
        limits.check(body)
        params = body.params()
        try:
            return self._submit(body, params, tenant, is_batch=is_batch)
        except RequestError as error:
            # The engine knows of a prompt and a schema; their fields have other names.
            if error.param == "prompt":
                error.param = body.prompt_param
            elif error.param is None and params.has_form:
                error.param = body.schema_param
            raise

    def _submit(
        self, body: GenerationRequest, params: SamplingParams, tenant: Tenant, *, is_batch: bool
    ) -> Admitted:
        limits = self.limits
        prompts = body.prompts(self.encoder)
        for prompt in prompts:
            limits.check_prompt(len(prompt))
        limits.check_prompt_logprobs(params, prompts)
        request_id = uuid.uuid4().hex
        timeout_s = None if is_batch else limits.request_timeout_s
        if body.timeout_s is not None:
            timeout_s = min(body.timeout_s, limits.request_timeout_s)
        streams: list[OutputStream] = []
        try:
            for i, token_ids in enumerate(prompts):
                streams.append(
                    self.service.submit(
                        token_ids,
                        params,
                        salt=tenant.salt(body.cache_salt),
                        priority=BATCH_PRIORITY if is_batch else 0,
                        request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
                        tenant=tenant.name,
                        timeout_s=timeout_s,
                        queue_limit=None if is_batch else limits.max_queue,
                        snapshot_at=token_ids.repeated if isinstance(token_ids, ChatPrompt) else (),
                    )
                )
            writers = make_writers(body, self.encoder, request_id, prompts)
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return Admitted(body, request_id, sum(map(len, prompts)), streams, writers)
