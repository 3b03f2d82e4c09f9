"""Engines that share blocks through a store answer as one that is alone, bit for bit."""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engines import make_prompts, run
from hybrid_prompts import TOKENS, note_logits
from stores import SECRET, FakeStore, needs_redis, redis_server
from test_hybrid_tiers import PROMPT, SIZES, assert_equal
from tiny_engine import build
from tiny_models import HYBRID_FAMILIES

from hotset.attention.state_tables import GRID
from hotset.engine.build import _Build
from hotset.engine.engine import Engine
from hotset.engine.loop import EngineLoop
from hotset.engine.messages import Report, Submit
from hotset.errors import ConfigError, TierError
from hotset.options import Options
from hotset.request import SamplingParams

MakeEngine = Callable[..., Engine]
PROMPTS = make_prompts()
HOST: dict[str, Any] = {"host_blocks": 200, "fetch_policy": "fetch"}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return written(tmp_path / "secret", SECRET)


def written(path: Path, secret: bytes) -> Path:
    path.write_bytes(secret)
    path.chmod(0o600)
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FakeStore]:
    store = FakeStore(tmp_path)
    yield store
    store.close()


@pytest.fixture(params=["redis-server", "fake"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store, real or not."""
    if request.param == "redis-server" and shutil.which(request.param) is None:
        pytest.skip("redis-server is not installed")
    with ExitStack() as undo:
        if request.param == "redis-server":
            yield undo.enter_context(redis_server())
        else:
            store = FakeStore(tmp_path)
            undo.callback(store.close)
            yield store.url


def drain(engine: Engine) -> None:
    """Write all that host memory has to the store."""
    assert engine.tiers is not None
    settle(engine)
    engine.tiers.begin_drain()
    settle(engine)


def settle(engine: Engine) -> None:
    """Wait until no copy is under way nor due."""
    assert engine.tiers is not None
    engine.tiers.is_idle = not engine.has_work
    while engine.tiers.is_busy or (engine.kv.states is not None and engine.kv.states._due):
        engine.kv.poll()
        engine.tiers.flush()
        engine.tiers.wait(0.01)
    engine.tiers.check()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_moe"])
def test_what_one_engine_left_in_a_store_another_one_finds(
    family: str, url: str, secret: Path, make_engine: MakeEngine
) -> None:
    expected = run(make_engine(family), PROMPTS)
    shared = {**HOST, "remote": url, "remote_secret_file": secret}
    one = make_engine(family, **shared)
    assert run(one, PROMPTS) == expected
    assert one.metrics.cached_tokens["remote"] == 0
    drain(one)
    assert one.metrics.moved_bytes["host>remote"] > 0
    other = make_engine(family, **shared, remote_encrypt=True)
    assert run(other, PROMPTS) == expected
    assert other.metrics.cached_tokens["remote"] > 0
    assert other.metrics.moved_bytes["remote>host"] > 0
    assert other.metrics.tier_bytes["remote first_read"] > 0
    assert not other.metrics.faults.total()


def test_requests_that_come_together_start_in_one_step_whenever_the_store_answers(
    store: FakeStore, secret: Path, make_engine: MakeEngine
) -> None:
    alone = make_engine()
    engine = make_engine(**HOST, remote=store.url, remote_secret_file=secret)
    assert engine.tiers is not None
    assert run(engine, PROMPTS) == run(alone, PROMPTS)
    settle(engine)
    engine.tiers.rates.prefill_tokens_per_s = 0.1  # so that the store has time
    steps: list[int] = []
    for one in (alone, engine):
        before = one.metrics.steps
        for prompt in PROMPTS[:2]:  # known as far as 20 tokens
            one.add_request(
                [*prompt[:20], *range(40)], SamplingParams(max_tokens=4, ignore_eos=True)
            )
        one.step()
        assert len(one.scheduler.running) == 2
        while one.has_work:
            one.step()
        steps.append(one.metrics.steps - before)
    assert steps[0] == steps[1]


def test_a_drained_engine_leaves_its_conversations_to_the_others(
    store: FakeStore, secret: Path, make_engine: MakeEngine
) -> None:
    shared = {**HOST, "remote": store.url, "remote_secret_file": secret}
    options = make_engine(**shared).options
    before, after = drained(options), drained(options)
    assert before[0] == after[0] and after[1] > before[1] == 0


def drained(options: Options) -> tuple[list[int], int]:
    """What an engine answers before it is drained, and the tokens that it found in the store."""
    ended, token_ids = threading.Event(), list[int]()

    def take(report: Report) -> None:
        for output in report.outputs:
            token_ids.extend(output.token_ids)
            if output.finish_reason is not None:
                ended.set()

    loop = EngineLoop(options, build, take)
    loop.submit(Submit("one", PROMPTS[1], SamplingParams(max_tokens=4, ignore_eos=True)))
    assert ended.wait(20)
    num_found = loop.metrics.cached_tokens["remote"]
    loop.drain(0.0)
    loop.close()
    return token_ids, num_found


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_states_come_back_from_a_store_with_the_logits_of_a_cold_run(
    family: str, store: FakeStore, secret: Path, make_engine: MakeEngine
) -> None:
    sizes = {**SIZES, "remote": store.url, "remote_secret_file": secret}
    engine = make_engine(family, **sizes)
    cold = note_logits(engine)
    answer = run(engine, [PROMPT], max_tokens=TOKENS)
    drain(engine)
    engine.close()
    engine = make_engine(family, **sizes)
    hot = note_logits(engine)
    assert run(engine, [PROMPT], max_tokens=TOKENS) == answer
    assert engine.metrics.cached_tokens == Counter(remote=2 * GRID)
    assert engine.metrics.state_hits == Counter(remote=1)
    assert_equal(cold[:TOKENS], hot)


def found(engine: Engine, **given: Any) -> int:
    """Tokens of the prompts that an engine finds in the store."""
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_tokens=1), **given)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
    return engine.metrics.cached_tokens["remote"]


def test_a_store_is_of_no_use_to_another_tenant_secret_model_or_rounding(
    store: FakeStore,
    secret: Path,
    tmp_path: Path,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = {**HOST, "remote": store.url, "remote_secret_file": secret}
    one = make_engine(**shared)
    found(one, salt=b"tenant")
    drain(one)
    stored = dict(store.values)
    others = {
        **shared,
        "remote_secret_file": written(tmp_path / "other", b"another fleet's secret"),
    }
    assert found(make_engine(**shared), salt=b"other tenant") == 0
    assert found(make_engine(**shared)) == 0
    assert found(make_engine(**others), salt=b"tenant") == 0
    assert found(make_engine(seed=1, **shared), salt=b"tenant") == 0
    monkeypatch.setattr(_Build, "_numerics", lambda self: "another GPU")
    assert found(make_engine(**shared), salt=b"tenant") == 0
    monkeypatch.undo()
    assert {name: store.values[name] for name in stored} == stored  # nobody could delete them
    assert found(make_engine(**shared), salt=b"tenant") > 0


def test_whoever_shares_with_any_finds_blocks_of_another_rounding(
    store: FakeStore, secret: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {**HOST, "remote": store.url, "remote_secret_file": secret, "remote_share": "any"}
    one = make_engine(**shared)
    found(one)
    drain(one)
    monkeypatch.setattr(_Build, "_numerics", lambda self: "another GPU")
    assert found(make_engine(**shared)) > 0


def flip(store: FakeStore) -> None:
    for name, value in store.values.items():
        store.values[name] = value[:-1] + bytes([value[-1] ^ 1])


def rotate(store: FakeStore) -> None:
    names = list(store.values)
    values = [store.values[name] for name in names]
    store.values.update(zip(names, values[1:] + values[:1], strict=True))


def shorten(store: FakeStore) -> None:
    get = store._get
    store.replies[b"GET"] = lambda name: get(name)[:-9]  # and the rest never comes


def hang(store: FakeStore) -> None:
    for name in (b"GET", b"SET", b"STRLEN", b"INFO", b"PING"):
        store.replies[name] = lambda *words: None


def hang_when_read(store: FakeStore) -> None:
    store.replies[b"GET"] = lambda name: None


def vanish(store: FakeStore) -> None:
    store.close()


@pytest.mark.parametrize("spoil", [flip, rotate, shorten, hang, hang_when_read, vanish])
def test_a_store_that_is_wrong_or_gone_changes_counters_and_no_token(
    spoil: Callable[[FakeStore], None], store: FakeStore, secret: Path, make_engine: MakeEngine
) -> None:
    expected = run(make_engine(), PROMPTS)
    shared = {**HOST, "remote": store.url, "remote_secret_file": secret}
    one = make_engine(**shared)
    run(one, PROMPTS)
    drain(one)
    other = make_engine(**shared)
    spoil(store)
    assert run(other, PROMPTS) == expected
    assert other.metrics.cached_tokens["remote"] == 0
    until_s = time.monotonic() + 5
    while not other.metrics.faults.total():  # an answer may be missing for longer than it counts
        assert time.monotonic() < until_s
        other.tiers.wait(0.05)  # type: ignore[union-attr]
        other.kv.poll()
    assert all(kind.startswith("remote_") for kind in other.metrics.faults)


def test_a_store_that_cannot_be_used_is_refused_at_start(
    store: FakeStore, secret: Path, tmp_path: Path, make_engine: MakeEngine
) -> None:
    shared = {**HOST, "remote": store.url, "remote_secret_file": secret}
    with pytest.raises(ConfigError, match="is no URL of a store"):
        make_engine(**{**shared, "remote": "http://store"})
    with pytest.raises(ConfigError, match="cannot be read"):
        make_engine(**{**shared, "remote_secret_file": tmp_path / "none"})
    store.max_memory = 0
    with pytest.raises(TierError, match="has no bound"):
        make_engine(**shared)


@needs_redis
def test_without_a_host_tier_payloads_pass_through_a_few_slots(
    secret: Path, make_engine: MakeEngine
) -> None:
    with redis_server() as url:
        engine = make_engine(remote=url, remote_secret_file=secret, fetch_policy="fetch")
        expected = run(engine, PROMPTS)
        drain(engine)
        engine.kv.pool.forget_cached()
        for key in list(engine.tiers.host._payloads):  # type: ignore[union-attr]
            engine.tiers.host.discard(key)  # type: ignore[union-attr]
        assert run(engine, PROMPTS) == expected
        assert engine.metrics.cached_tokens["remote"] > 0


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_an_engine_fetches_from_a_peer_that_a_request_names_and_answers_the_same(
    family: str, secret: Path, tmp_path: Path, make_engine: MakeEngine
) -> None:
    def make(name: str) -> tuple[Engine, str]:
        url = f"unix://{tmp_path / name}"
        return make_engine(family, **HOST, peer_url=url, remote_secret_file=secret), url

    (one, peer), (other, _) = make("one"), make("other")
    expected = run(one, PROMPTS)
    settle(one)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        other.add(Submit(f"r{number}", prompt, params, peer=peer), {})
    found: dict[str, list[int]] = {f"r{number}": [] for number in range(len(PROMPTS))}
    while other.has_work:
        for output in other.step():
            found[output.request_id] += output.token_ids
    assert list(found.values()) == expected
    assert other.metrics.cached_tokens["peer"] > 0 and other.metrics.moved_bytes["peer>host"] > 0
    assert not other.metrics.faults.total()


def test_peers_of_a_model_with_states_are_refused(
    secret: Path, tmp_path: Path, make_engine: MakeEngine
) -> None:
    with pytest.raises(ConfigError, match="keep a state peers have the KV alone"):
        make_engine(
            "qwen3_next", **SIZES, peer_url=f"unix://{tmp_path / 'a'}", remote_secret_file=secret
        )
