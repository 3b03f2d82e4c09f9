"""The same work over HTTP, against any server with OpenAI's `/v1/completions`."""

import time
from collections.abc import Callable
from dataclasses import replace

import httpx

from hotset.bench.http_stream import Endpoint
from hotset.bench.load import LoadProcesses, Played, num_processes
from hotset.bench.load_player import Asking
from hotset.bench.play import Play
from hotset.bench.result import ArmRun, observe
from hotset.bench.workload import Spec, Work, prefix_work, token_range, warm_up
from hotset.cost.catalog import find_config
from hotset.errors import ConfigError, PlanError
from hotset.foreign_text import parse_json

_CONNECT_S = 30.0
_READ_S = 600.0
_PIN_STALL_S = 15.0
_ASK_EVERY_S = 0.25
_BUSY = 0.8  # of a core: from there on a client may be what is measured


class Server:
    """One server and one of its models.

    Args:
        url: with or without `/v1` at its end.
        model: name at the server; None takes the first it lists.
        key: API key, if it wants one.
        vocab_size: of the model; None looks the model up among those known here.

    Attributes:
        gives_ids: whether the server returns the ids of its answers' tokens.

    Raises:
        ConfigError: the server cannot be reached or lists no models, or the
            vocabulary of its model is not known here.
    """

    def __init__(
        self, url: str, *, model: str | None, key: str | None, vocab_size: int | None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"against is {url!r}; expected http://HOST:PORT")
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self._endpoint = Endpoint.of(f"{self.url}/completions", key)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model or self._first_model()
        self.gives_ids = False
        self.vocab_size = vocab_size or known_vocab_size(self.model)

    @property
    def asking(self) -> Asking:
        """How it is asked."""
        return Asking(self._endpoint, self.model, self.gives_ids, token_range(self.vocab_size))

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
                "expected the models of an OpenAI-compatible server (its key: api_key)"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise ConfigError(f"{self.url} cannot be reached: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{self.url}/models lists no model; name one") from error

    def find_out(self, prompt: list[int]) -> None:
        """Send one request and learn what the server can do.

        Raises:
            ConfigError: it refuses a prompt of token ids.
        """
        for with_ids in (True, False):
            body = replace(self.asking, gives_ids=with_ids).body(prompt, 1)
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

    def wait_for_host_tier(self) -> float | None:
        """Wait until all memory of the server's host tier can be used, as a hotset server tells.

        It is pinned beside the start. The wait ends, too, where the tier has not grown for a while.

        Returns:
            The seconds; None where the server does not tell.
        """
        start_s = grown_s = time.perf_counter()
        num_ready = -1
        while True:
            ready = self._host_tier()
            if ready is None:
                return None
            now_s = time.perf_counter()
            if ready[0] > num_ready:
                num_ready, grown_s = ready[0], now_s
            if ready[0] >= ready[1] or now_s - grown_s > _PIN_STALL_S:
                return now_s - start_s
            time.sleep(_ASK_EVERY_S)

    def _host_tier(self) -> tuple[int, int] | None:
        """Blocks that the host tier holds now, and in the end."""
        base = self.url.removesuffix("/v1")
        try:
            answer = httpx.get(
                f"{base}/status.json", headers=self._headers, timeout=_CONNECT_S, trust_env=False
            )
            if answer.status_code != 200:
                return None
            for tier in parse_json(answer.content)["engine"]["tiers"]:
                if tier["name"] == "host":
                    return int(tier["capacity"]), int(tier["planned"])
        except (httpx.HTTPError, OSError, ValueError, LookupError, TypeError):
            return None
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
    raise ConfigError(f"the vocabulary of {name!r} is not known here; give vocab_size")


def run_against(
    server: Server,
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
        ConfigError: the server cannot be reached, or refuses what is asked; EngineError: the
            client's own processes have failed.
    """
    begin_s = time.perf_counter()
    wave = warm_up(spec, server.vocab_size, work.longest_context, is_small=False)
    server.find_out(wave.sessions[0].turns[0].make_tokens())
    waited_s = server.wait_for_host_tier()
    load = LoadProcesses(num_processes(len(work.sessions)))
    try:
        load.play(server.asking, wave)
        if work.prefixes:
            load.play(server.asking, prefix_work(work))
        warm_up_s = time.perf_counter() - begin_s
        played = load.play(server.asking, work, max_s=max_s, progress=progress)
    finally:
        load.close()
    run = observe(arm, repeat, played.play, played.wall_s, is_complete=played.is_complete)
    run.warm_up_s = warm_up_s
    run.notes += _notes(server, work, arm, played, waited_s)
    return run


def _notes(
    server: Server, work: Work, arm: str, played: Played, waited_s: float | None
) -> list[str]:
    notes = [
        f"{arm}: sent from {played.num_processes} processes, of which the busiest took "
        f"{played.busiest:.0%} of a core"
    ]
    if played.busiest > _BUSY:
        notes.append(f"{arm}: the client was busy, and the figures may be its own")
    if waited_s is not None and waited_s > 1:
        notes.append(f"{arm}: sent after {waited_s:.0f} s, as its host tier was being made ready")
    has_history = any(turn.extends for session in work.sessions for turn in session.turns)
    if has_history and not server.gives_ids:
        notes.append(
            f"{arm} gives no token ids: later turns sent random tokens in place of its answers"
        )
    if work.prefixes:
        notes.append(f"{arm}: the prefixes were sent once before, and may lie in any tier")
    return notes
