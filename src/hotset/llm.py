"""LLM: hotset from Python, in a script or a notebook. Imports no torch."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hotset.engine.completion import Completion, gather
from hotset.engine.output_stream import OutputStream
from hotset.engine.service import EngineService
from hotset.errors import ConfigError, EngineError, RequestError
from hotset.options import OPTIONS, Options
from hotset.request import FinishReason, RequestOutput, SamplingParams
from hotset.text.prompt import Message, PromptEncoder

Chat = Sequence[Message]
Prompt = str | Chat | Sequence[int]

_A_PROMPT = (
    "expected a text, a chat (a list of messages such as {'role': 'user', 'content': 'Hello'}) or "
    "a list of token ids"
)


class LLM:
    """A model, ready to answer. Close it, or use it in a `with` statement, to free its memory.

    A prompt is a text, which the model continues, a chat (a list of messages such as
    `{"role": "user", "content": "Hello"}`), which it answers, or a list of token ids, which are
    taken as they are.

    It belongs to the process that made it: in a fork of that process every call but `close` raises
    EngineError, and `close` does nothing.

        with LLM(hot_gib=0.5, host_gib=2) as llm:
            for completion in llm.generate(["Once upon a time", "The sea"]):
                print(completion.text)

    Args:
        model: a folder, a GGUF file, a hub id, or None for the small default model.
        hot_gib: KV memory on the device; None takes what is left beside the weights.
        host_gib: host tier for KV; 0 is none.
        disk_gib: disk tier for KV; 0 is none.
        disk_path: folder of the disk tier.
        options: any other of `hotset.options.OPTIONS`: see docs/options.md.

    Raises:
        ConfigError: options or sizes that cannot work; ModelError: the model cannot be loaded or
            run; TierError: the disk tier cannot be opened. Nothing is left behind.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        hot_gib: float | None = None,
        host_gib: float = 0.0,
        disk_gib: float = 0.0,
        disk_path: str | Path | None = None,
        **options: Any,
    ) -> None:
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise ConfigError(
                f"LLM has no option {unknown[0]!r}; expected one of {', '.join(sorted(OPTIONS))}"
            )
        asked = Options.of(
            model=model,
            hot_gib=hot_gib,
            host_gib=host_gib,
            disk_gib=disk_gib,
            disk_path=disk_path,
            **options,
        )
        self.service = EngineService(asked)
        # The engine's thread would keep a forgotten model in memory, as in a notebook's cell.
        self._finalizer = weakref.finalize(self, self.service.close)
        try:
            self._encoder = PromptEncoder(
                self.service.model, finds_repeats=self.service.keeps_states
            )
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts, all at once; returns when all are done.

        Args:
            prompts: a text, a chat, a list of token ids, or a list of these, mixed as one likes.
            params: for all prompts, or one for each; None is greedy, 256 tokens.

        Returns:
            The completions in the order of the prompts, `params.n` for each. One that could not
            be finished has the finish reason `error` and says why in `error`.

        Raises:
            ConfigError: a prompt or the parameters are of another type; nothing runs.
            RequestError: a prompt or its parameters cannot be served; nothing runs on.
            EngineError: the engine has failed, was closed before all were done, or is in another
                process, of which this one is a fork.
        """
        self.service.raise_unless_healthy()
        batch = _as_list(prompts)
        each = _params_for(batch, params)
        streams: list[OutputStream] = []
        try:
            for position, (prompt, one) in enumerate(zip(batch, each, strict=True)):
                try:
                    streams.append(self._submit(prompt, one))
                except RequestError as error:
                    message = f"{_where(position, batch)}{error}"
                    raise RequestError(message, code=error.code, param=error.param) from error
            completions = []
            for stream, one in zip(streams, each, strict=True):
                of_prompt = gather(stream, one.n)
                if any(c.finish_reason == FinishReason.ABORT.value for c in of_prompt):
                    self._check_abort(stream, of_prompt[0].error)
                completions += of_prompt
        finally:
            for stream in streams:
                stream.abort()  # where an exception, such as Ctrl-C, ended the loop above
        if any(completion.failed for completion in completions):
            self.service.raise_unless_healthy()
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion as it is made. Leaving the loop stops it.

        Raises:
            ConfigError: the prompt or the parameters are of another type.
            RequestError: it cannot be served, or ended with an error.
            EngineError: the engine has failed, was closed before the end, or is in another
                process, of which this one is a fork.
        """
        stream = self._submit(prompt, _single(params))
        for output in stream:
            self._raise_error_of(output, stream)
            if output.text:
                yield output.text

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[str]:
        """`stream` for asyncio; cancelling the task stops the completion. Raises what it does."""
        # Compiling a JSON schema may take long. The thread goes on where the task is cancelled.
        submitting = asyncio.ensure_future(asyncio.to_thread(self._submit, prompt, _single(params)))
        try:
            stream = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_abort_submitted)
            raise
        async with contextlib.aclosing(aiter(stream)) as outputs:
            async for output in outputs:
                self._raise_error_of(output, stream)
                if output.text:
                    yield output.text

    def close(self) -> None:
        """Stop what runs and free the memory. Idempotent. What others still read raises there."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, prompt: Prompt, params: SamplingParams) -> OutputStream:
        self.service.raise_unless_healthy()  # a tokenizer in a fork has a word of its own to say
        _check_type(prompt)
        token_ids: Sequence[int]
        repeated: Sequence[int] = ()
        if isinstance(prompt, str):
            token_ids = self._encoder.encode_text(prompt)
        elif not prompt:
            raise RequestError(f"the prompt is empty; {_A_PROMPT}")
        elif _is_chat(prompt):
            token_ids = chat = self._encoder.encode_chat(prompt)  # type: ignore[arg-type]
            repeated = chat.repeated
        else:
            token_ids = [int(token_id) for token_id in prompt]  # type: ignore[arg-type]
        return self.service.submit(token_ids, params, snapshot_at=repeated)

    def _raise_error_of(self, output: RequestOutput, stream: OutputStream) -> None:
        if output.finish_reason is FinishReason.ABORT:
            self._check_abort(stream, output.error)
        elif output.error is not None:
            raise RequestError(output.error) if self.service.healthy else EngineError(output.error)

    def _check_abort(self, stream: OutputStream, error: str | None) -> None:
        """Raise EngineError where a stream was stopped, and not by its reader."""
        if not stream.is_aborted:
            raise EngineError(error or "the engine was closed before the completion was done")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or _is_chat(prompts) or _is_token_ids(prompts):
        return [prompts]  # type: ignore[list-item]  # one prompt, as was just seen
    if not _is_list(prompts):
        raise ConfigError(f"prompts is {_described(prompts)}; {_A_PROMPT}, or a list of these")
    for position, prompt in enumerate(prompts):
        try:
            _check_type(prompt)
        except ConfigError as error:
            raise ConfigError(f"{_where(position, prompts)}{error}") from None
    return list(prompts)  # type: ignore[arg-type]


def _check_type(prompt: object) -> None:
    """Raise ConfigError where it is no prompt. An empty list is one, to be refused as a request."""
    is_empty = _is_list(prompt) and not prompt
    if not (isinstance(prompt, str) or is_empty or _is_chat(prompt) or _is_token_ids(prompt)):
        raise ConfigError(f"the prompt is {_described(prompt)}; {_A_PROMPT}")


def _params_for(
    batch: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(batch)
    if not _is_list(params) or not all(isinstance(one, SamplingParams) for one in params):
        raise ConfigError(
            f"params is {_described(params)}; expected a SamplingParams, or a list of one for each "
            "prompt"
        )
    if len(params) != len(batch):
        raise RequestError(f"{len(params)} params for {len(batch)} prompts; give one for each")
    return list(params)


def _where(position: int, batch: Sequence[object]) -> str:
    return f"prompt {position}: " if len(batch) > 1 else ""


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_chat(prompt: object) -> bool:
    return _is_list_of(prompt, lambda one: isinstance(one, Mapping))


def _is_token_ids(prompt: object) -> bool:
    return _is_list_of(prompt, lambda one: isinstance(one, Integral) and not isinstance(one, bool))


def _is_list_of(value: object, is_one: Callable[[object], bool]) -> bool:
    """Whether a list has elements, and `is_one` holds for each."""
    return _is_list(value) and bool(value) and all(map(is_one, value))  # type: ignore[call-overload]


def _described(value: object) -> str:
    """A value's type, with the types of its elements where it is a list."""
    if value is None:
        return "None"
    name = type(value).__name__
    if not _is_list(value):
        return f"of type {name}"
    inner = sorted({type(one).__name__ for one in value})  # type: ignore[attr-defined]
    return f"a {name} of {' and '.join(inner)}" if inner else f"an empty {name}"


def _single(params: SamplingParams | None) -> SamplingParams:
    if not isinstance(params, SamplingParams | None):
        raise ConfigError(f"params is {_described(params)}; expected a SamplingParams")
    params = params or SamplingParams()
    if params.n != 1:
        raise RequestError(f"n is {params.n}; a stream of text has one output, use generate")
    return params


def _abort_submitted(submitting: "asyncio.Future[OutputStream]") -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().abort()
