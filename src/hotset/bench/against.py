"""The same work over HTTP, against any server with OpenAI's `/v1/completions`."""

import asyncio
import random
import time
from array import array
from collections.abc import Callable
from typing import Any

import httpx

from hotset.bench.play import Due, Play
from hotset.bench.result import ArmRun, observe
from hotset.bench.workload import Spec, Work, prefix_work, token_range, warm_up
from hotset.errors import ConfigError, PlanError
from hotset.foreign_text import parse_json
from hotset.plan.catalog import find_config

_CONNECT_S = 30.0
_READ_S = 600.0  # a request may wait so long for its next token


class Client:
    """One server and one of its models.

    Args:
        url: with or without `/v1` at its end.
        model: name at the server; None takes the first it lists.
        key: API key, if it wants one.
        vocab_size: of the model; None looks the model up among those known here.

    Attributes:
        gives_ids: whether the server returns the ids of its answers' tokens, as vLLM does.

    Raises:
        ConfigError: the server cannot be reached or lists no models, or the
            vocabulary of its model is not known here.
    """

    def __init__(
        self, url: str, *, model: str | None, key: str | None, vocab_size: int | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--against is {url!r}; expected http://HOST:PORT")
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model or self._first_model()
        self.gives_ids = False
        self.vocab_size = vocab_size or known_vocab_size(self.model)
        self._token_range = token_range(self.vocab_size)

    def _first_model(self) -> str:
        try:
            answer = httpx.get(
                f"{self.url}/models", headers=self._headers, timeout=_CONNECT_S, trust_env=False
            )
            answer.raise_for_status()
            return str(parse_json(answer.content)["data"][0]["id"])
        except httpx.HTTPStatusError as error:
            raise ConfigError(
                f"{self.url}/models answers {error.response.status_code}; "
                "expected the models of an OpenAI-compatible server (its key: --api-key)"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ConfigError(f"{self.url} cannot be reached: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.url}/models lists no model; name one") from error

    def play(
        self,
        work: Work,
        *,
        max_s: float | None = None,
        progress: Callable[[Play, float], None] = lambda play, now_s: None,
    ) -> tuple[Play, float, bool]:
        """Send the work; returns the records, the wall time and whether all was sent and ended.

        Where the server gives no token ids, later turns send random stand-ins in place of the
        answers' tokens. A request that fails ends its session; it is told in its record.
        """
        return asyncio.run(self._play(work, max_s, progress))

    def find_out(self, prompt: list[int]) -> None:
        """Send one request and learn what the server can do.

        Raises:
            ConfigError: it refuses a prompt of token ids.
        """
        for with_ids in (True, False):
            body = self._body(prompt, 1, with_ids=with_ids)
            body["stream"] = False
            body.pop("stream_options")
            try:
                answer = httpx.post(
                    f"{self.url}/completions",
                    headers=self._headers,
                    json=body,
                    timeout=_READ_S,
                    trust_env=False,
                )
            except (httpx.HTTPError, OSError) as error:
                raise ConfigError(f"{self.url} cannot be reached: {error}") from error
            if answer.status_code == 200:
                try:
                    choice = parse_json(answer.content)["choices"][0]
                except (ValueError, LookupError, TypeError) as error:
                    raise ConfigError(f"{self.url}/completions answers no completion") from error
                self.gives_ids = bool(with_ids and choice.get("token_ids"))
                return
        raise ConfigError(
            f"{self.url}/completions answers {answer.status_code} to a prompt of token ids: "
            f"{' '.join(answer.text.split())[:300]}"
        )

    def _body(
        self, prompt: list[int], max_tokens: int, *, with_ids: bool, temperature: float = 0.0
    ) -> dict[str, Any]:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,  # no seed: some servers are slower with one
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if with_ids:
            body["return_token_ids"] = True
        return body

    async def _play(
        self, work: Work, max_s: float | None, progress: Callable[[Play, float], None]
    ) -> tuple[Play, float, bool]:
        play = Play(work)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(_READ_S, connect=_CONNECT_S, pool=None)
        tasks: set[asyncio.Task[None]] = set()
        start_s = time.perf_counter()
        changed = asyncio.Event()
        is_complete = True

        async with httpx.AsyncClient(
            limits=limits, timeout=timeout, headers=self._headers, trust_env=False
        ) as http:

            async def send(due: Due) -> None:
                error: str | None = "broken off"
                try:
                    error = await self._stream(http, play, due, start_s)
                except (httpx.HTTPError, OSError, ValueError) as problem:
                    error = f"{type(problem).__name__}: {problem}"
                finally:
                    play.on_end(due.record, time.perf_counter() - start_s, error)
                    changed.set()

            while not play.is_over:
                elapsed_s = time.perf_counter() - start_s
                if max_s is not None and elapsed_s > max_s:
                    is_complete = False
                    break
                while (due := play.take_due(elapsed_s)) is not None:
                    task = asyncio.create_task(send(due))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                progress(play, elapsed_s)
                arrival_s = play.next_arrival_s()
                wait_s = 0.5 if arrival_s is None else min(0.5, max(0.0, arrival_s - elapsed_s))
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), wait_s)
                except TimeoutError:
                    continue
            wall_s = time.perf_counter() - start_s
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return play, wall_s, is_complete

    async def _stream(
        self, http: httpx.AsyncClient, play: Play, due: Due, start_s: float
    ) -> str | None:
        """One request; returns what went wrong, if anything."""
        record = due.record
        temperature = play.work.temperature
        body = self._body(
            due.prompt, due.output_tokens, with_ids=self.gives_ids, temperature=temperature
        )
        told_tokens: int | None = None
        async with http.stream("POST", f"{self.url}/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode("utf-8", "replace")
                return f"HTTP {response.status_code}: {' '.join(text.split())[:300]}"
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = parse_json(line[6:])
                if error := event.get("error"):
                    return str(error.get("message") if isinstance(error, dict) else error)
                if usage := event.get("usage"):
                    told_tokens = usage.get("completion_tokens", told_tokens)
                for choice in event.get("choices") or ():
                    ids = choice.get("token_ids") or ()
                    if choice.get("text") or ids:
                        play.on_tokens(record, tuple(ids), time.perf_counter() - start_s)
        if record.first_s is None:  # all its text came to nothing
            play.on_tokens(record, (), time.perf_counter() - start_s)
        num_tokens = due.output_tokens if told_tokens is None else told_tokens
        if len(record.token_ids) != num_tokens:
            rng = random.Random(f"{record.session}/{record.turn}")
            record.token_ids = array("i", rng.choices(range(*self._token_range), k=num_tokens))
        record.num_tokens = num_tokens
        return None


def known_vocab_size(name: str) -> int:
    """The vocabulary of a model by its name at a server, from the configs known here.

    Raises:
        ConfigError: it is not known.
    """
    short = name.rsplit("/", 1)[-1].lower()
    for known in (name, short, short.removesuffix("-instruct").removesuffix("-it")):
        try:
            config, _, _ = find_config(known)
        except PlanError:
            continue
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        if isinstance(size, int):
            return size
    raise ConfigError(f"the vocabulary of {name!r} is not known here; give --vocab-size")


def run_against(
    client: Client,
    spec: Spec,
    work: Work,
    *,
    arm: str,
    repeat: int,
    max_s: float | None,
    progress: Callable[[Play, float], None],
) -> ArmRun:
    """Warm the server up, send the work, and take down what its client sees.

    Raises:
        ConfigError: the server cannot be reached, or refuses what is asked.
    """
    begin_s = time.perf_counter()
    wave = warm_up(spec, client.vocab_size, work.longest_context, is_small=False)
    client.find_out(wave.sessions[0].turns[0].make_tokens())
    client.play(wave)
    if work.prefixes:
        client.play(prefix_work(work))
    warm_up_s = time.perf_counter() - begin_s
    play, wall_s, is_complete = client.play(work, max_s=max_s, progress=progress)
    run = observe(arm, repeat, play, wall_s, is_complete=is_complete)
    run.warm_up_s = warm_up_s
    has_history = any(turn.extends for session in work.sessions for turn in session.turns)
    if has_history and not client.gives_ids:
        run.notes.append(
            f"{arm} gives no token ids: later turns sent random tokens in place of its answers"
        )
    if work.prefixes:
        run.notes.append(f"{arm}: the prefixes were sent once before, and may lie in any tier")
    return run
