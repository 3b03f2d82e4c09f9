"""LLM: hotset from Python, in a script or a notebook."""

import asyncio
import dataclasses
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hotset.config import EngineConfig
from hotset.engine.completion import Completion, gather
from hotset.engine.service import EngineService, OutputStream
from hotset.errors import ConfigError, EngineError, RequestError
from hotset.model.prompt import Message, PromptEncoder
from hotset.request import SamplingParams

Chat = Sequence[Message]
Prompt = str | Chat


class LLM:
    """A model, ready to answer. Close it, or use it in a `with` statement, to free its memory.

    A prompt is a text, which the model continues, or a chat (a list of messages such as
    `{"role": "user", "content": "Hello"}`), which it answers.

        with LLM(hot_gib=0.5, host_gib=2) as llm:
            for completion in llm.generate(["Once upon a time", "The sea"]):
                print(completion.text)

    Args:
        model: a folder, a GGUF file, a hub id, or None for the small default model.
        hot_gib: KV memory on the device; None takes what is left beside the weights.
        host_gib: host tier for KV; 0 is none.
        disk_gib: disk tier for KV; 0 is none.
        disk_path: folder of the disk tier.
        options: any other field of `hotset.config.EngineConfig`.

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
        known = {field.name for field in dataclasses.fields(EngineConfig)}
        if unknown := sorted(set(options) - known):
            raise ConfigError(
                f"LLM has no option {unknown[0]!r}; expected one of {', '.join(sorted(known))}"
            )
        config = EngineConfig(
            model=None if model is None else str(model),
            hot_gib=hot_gib,
            host_gib=host_gib,
            disk_gib=disk_gib,
            disk_path=None if disk_path is None else Path(disk_path),
            **options,
        )
        self.service = EngineService(config)
        # The engine's thread would keep a forgotten model in memory, as in a notebook's cell.
        self._finalizer = weakref.finalize(self, self.service.close)
        try:
            self._encoder = PromptEncoder(self.service.model)
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
            prompts: a text, a chat, or a list of these.
            params: for all prompts, or one for each; None is greedy, 256 tokens.

        Returns:
            The completions in the order of the prompts, `params.n` for each. One that could not
            be finished has the finish reason `error` and says why in `error`.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing runs on.
            EngineError: the engine has failed or was closed.
        """
        batch = _as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(batch)
        else:
            each = list(params)
        if len(each) != len(batch):
            raise RequestError(f"{len(each)} params for {len(batch)} prompts; give one for each")
        streams: list[OutputStream] = []
        try:
            for position, (prompt, one) in enumerate(zip(batch, each, strict=True)):
                try:
                    streams.append(self._submit(prompt, one))
                except RequestError as error:
                    where = f"prompt {position}: " if len(batch) > 1 else ""
                    raise RequestError(f"{where}{error}") from error
            completions = [
                completion
                for stream, one in zip(streams, each, strict=True)
                for completion in gather(stream, one.n)
            ]
        finally:
            for stream in streams:
                stream.abort()  # where an exception, such as Ctrl-C, ended the loop above
        if any(completion.failed for completion in completions):
            self.service.raise_unless_healthy()
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the text of one completion as it is made. Leaving the loop stops it.

        Raises:
            RequestError: it cannot be served, or ended with an error.
            EngineError: the engine has failed or was closed.
        """
        for output in self._submit(prompt, _single(params)):
            if output.error is not None:
                raise self._error(output.error)
            if output.text:
                yield output.text

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[str]:
        """`stream` for asyncio; cancelling the task stops the completion."""
        # Compiling a JSON schema may take long.
        stream = await asyncio.to_thread(self._submit, prompt, _single(params))
        async for output in stream:
            if output.error is not None:
                raise self._error(output.error)
            if output.text:
                yield output.text

    def close(self) -> None:
        """Stop what runs and free the memory. Idempotent."""
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
        if isinstance(prompt, str):
            token_ids = self._encoder.encode_text(prompt)
        elif _is_chat(prompt):
            token_ids = self._encoder.encode_chat(prompt)
        else:
            raise RequestError(
                f"a prompt is a {type(prompt).__name__}; expected a text or a list of messages"
            )
        return self.service.submit(token_ids, params)

    def _error(self, error: str) -> Exception:
        return RequestError(error) if self.service.healthy else EngineError(error)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and _is_chat(prompts)):
        return [prompts]  # type: ignore[list-item]  # a chat, as was just seen
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; expected a text, a chat, or a list of these"
        )
    return list(prompts)  # type: ignore[arg-type]


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and all(isinstance(m, Mapping) for m in prompt)


def _single(params: SamplingParams | None) -> SamplingParams:
    params = params or SamplingParams()
    if params.n != 1:
        raise RequestError(f"n is {params.n}; a stream of text has one output, use generate")
    return params
