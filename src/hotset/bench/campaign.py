"""All runs of one call: arms in rounds, each kept as soon as it was measured."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hotset.bench.against import Server, run_against
from hotset.bench.arms import check_arms, needs_host_experts, order_of
from hotset.bench.machine import describe_machine
from hotset.bench.play import Play
from hotset.bench.result import ArmRun, BenchResult, Failure, verify
from hotset.bench.runs import Bench, RunOptions, Say, describe_error
from hotset.bench.verdict import verdict
from hotset.bench.workload import TEXTS, Spec, Work, make_work
from hotset.cost.catalog import find_config
from hotset.cpu_libraries import set_threads
from hotset.engine.layout_choice import choose_layout, stored_config
from hotset.engine.load import load_on_ranks
from hotset.errors import ConfigError, EngineError
from hotset.experts.disk import ExpertSink
from hotset.model.dummy import load_dummy
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.options import Options

_DUMMY_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Target:
    """A server to compare with; see `against.Server`."""

    url: str
    model: str | None = None
    key: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What to run.

    Attributes:
        arms: of `arms.ARMS`; may be empty where there is a target.
    """

    spec: Spec
    config: Options
    dummy_weights: bool
    arms: list[str]
    repeats: int
    options: RunOptions
    target: Target | None = None


def run_bench(
    order: Order, say: Say, keep: Callable[[BenchResult], None] = lambda result: None
) -> BenchResult:
    """Run all arms `repeats` times, in rotating order.

    A run that fails is noted, and the others go on. `keep` is called with all results so far
    after each run.

    Raises:
        HotsetError: nothing can be run as asked, or no run has ended.
    """
    check_arms(order.arms, order.config)
    if order.options.router_skew is not None and not order.dummy_weights:
        raise ConfigError(
            f"router_skew is {order.options.router_skew}, but the weights are not random; give "
            "dummy_weights, or leave it out"
        )
    if order.target is not None and order.spec.workload in TEXTS:
        raise ConfigError(
            f"the workload `{order.spec.workload}` is text, which no server is sent; give another "
            "workload, or leave out against"
        )
    with ExitStack() as stack:
        return _run_bench(order, say, keep, stack)


def _run_bench(
    order: Order, say: Say, keep: Callable[[BenchResult], None], stack: ExitStack
) -> BenchResult:
    bench = client = None
    run_of: dict[str, Callable[[str, int], ArmRun]] = {}
    if order.arms:
        order = _with_layout(order, say)
        loaded = _load(order, say)
        if loaded.ranks is not None:
            stack.callback(loaded.ranks.close)
        bench = Bench(order.spec, order.config, loaded, order.options, say)
        run_of = dict.fromkeys(order.arms, bench.run)
        work = bench.work
    if (target := order.target) is not None:
        client = Server(
            target.url, model=target.model, key=target.key, vocab_size=target.vocab_size
        )
        max_context = order.config.schedule.max_model_len
        if bench is None:
            work = make_work(order.spec, client.vocab_size, max_context=max_context)
        run_of[client.url] = partial(_run_against, client, order, work, say)
    asked = _asked(order, bench, client)
    result = BenchResult(work.title, asked, describe_machine(), is_open_loop=work.is_open_loop)
    arms = list(run_of)
    for repeat in range(order.repeats):
        for arm in order_of(arms, repeat):
            try:
                done = run_of[arm](arm, repeat)
            except Exception as error:  # the other arms' figures are worth keeping
                result.failures.append(Failure(arm, repeat, describe_error(error)))
                say.line(f"{arm}: failed: {result.failures[-1].reason}")
            else:
                result.runs.append(done)
                result.runs.sort(key=lambda run: (arms.index(run.arm), run.repeat))
                say.line(
                    f"{arm}: {done.requests} of {work.num_requests} requests, {done.wall_s:.2f} s, "
                    f"{done.total_tokens_per_s:,.0f} tokens/s, {done.output_tokens_per_s:,.0f} of "
                    "output"
                )
            _conclude(result, verified=order.options.verify)
            keep(result)
    if not result.runs:
        failure = result.failures[0]
        raise EngineError(f"no run ended; {failure.arm}: {failure.reason}")
    return result


def _run_against(
    client: Server, order: Order, work: Work, say: Say, arm: str, repeat: int
) -> ArmRun:
    def progress(play: Play, now_s: float) -> None:
        say.progress(
            lambda: f"{arm}: {now_s:.0f} s, {play.num_ended} of {work.num_requests} requests"
        )

    run = run_against(
        client,
        order.spec,
        work,
        arm=arm,
        repeat=repeat,
        max_s=order.options.max_s,
        progress=progress,
    )
    # Sampled answers of a server are drawn by other numbers: no two could be compared.
    if not order.options.verify or not client.gives_ids or order.spec.temperature:
        run.outputs.clear()
    return run


def _conclude(result: BenchResult, *, verified: bool) -> None:
    result.verdict = verdict(result)
    compared = [run for run in result.runs if run.outputs]
    if verified and compared:
        result.verification = verify(compared)


def _with_layout(order: Order, say: Say) -> Order:
    """The order with a layout where it has GPUs alone."""

    def shape_config(options: Options) -> tuple[dict[str, Any], str]:
        return find_config(options.model.model or _DUMMY_MODEL)[:2]

    read = shape_config if order.dummy_weights else stored_config
    config, chosen = choose_layout(order.config, read)
    if chosen:
        say.line(chosen)
    return replace(order, config=config)


def _load(order: Order, say: Say) -> LoadedModel:
    config = order.config
    start_s = time.perf_counter()
    set_threads(config.runtime.threads)
    on_host = needs_host_experts(order.arms, config)
    skew = order.options.router_skew
    loaded = load_on_ranks(config, load_part, config, order.dummy_weights, skew, on_host)
    kind = "random weights" if order.dummy_weights else "weights"
    say.line(
        f"{loaded.name}: {kind}, {loaded.model.dtype} on {loaded.model.device}, "
        f"in {time.perf_counter() - start_s:.1f} s"
    )
    return loaded


def load_part(
    config: Options, dummy_weights: bool, router_skew: float | None, experts_on_host: bool
) -> LoadedModel:
    """What one rank has of the model that is measured; other ranks find this by its name."""
    where: dict[str, Any] = {
        "device": config.model.device,
        "dtype": config.model.dtype,
        "experts_on_host": experts_on_host,
        "experts": ExpertSink(config.experts, read_deadline_s=config.memory.disk_read_deadline_s),
    }
    if dummy_weights:
        return load_dummy(config.model.model or _DUMMY_MODEL, router_skew=router_skew, **where)
    return load_model(
        config.model.model,
        **where,
        allow_widening=config.model.allow_widening,
        activations=config.model.activations,
    )


def _asked(order: Order, bench: Bench | None, client: Server | None) -> dict[str, Any]:
    """What was run, as plain data."""
    config = order.config.flat()
    asked: dict[str, Any] = {
        "workload": order.spec.as_dict(),
        "arms": order.arms,
        "repeats": order.repeats,
        "engine": {k: str(v) if isinstance(v, Path) else v for k, v in config.items()},
        "notes": [],
    }
    if bench is not None:
        asked |= bench.facts() | {
            "dummy_weights": order.dummy_weights,
            "router_skew": order.options.router_skew,
            "notes": bench.notes,
        }
    if client is not None:
        asked["against"] = {"url": client.url, "model": client.model}
    return asked
