"""The workloads of a comparison on one GPU, all in one process, engines shared between them.

`hotset bench --preset NAME` makes a fresh engine for each arm, which costs half a minute each; here
an engine with a host tier runs C6, C3, B and a shared prefix one after the other, then one without,
and one that holds everything runs A. Shapes and seeds are those of the presets.

    python benchmarks/gpu_suite.py --sections link,tiered,hot --out benchmarks/results/gpu_h200.json
    python benchmarks/gpu_suite.py --sections resident --out benchmarks/results/gpu_h200_a.json
    python benchmarks/gpu_suite.py --sections tiered,hot --only C6,C3 --out FILE
"""

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch

from hotset.bench.driver import drive, wait_for_host_tier
from hotset.bench.figures import counters_since
from hotset.bench.machine import release
from hotset.bench.presets import PRESETS
from hotset.bench.result import observe
from hotset.bench.workload import Spec, filler, make_work, prefix_work, warm_up
from hotset.cost.cache_spec import KeysValues
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.memory.arena import DeviceArena, HostArena
from hotset.memory.copy_runs import Run
from hotset.memory.cuda_copier import CudaCopier
from hotset.model.dummy import load_dummy
from hotset.model.loaded import LoadedModel
from hotset.options import Options

MODEL = "llama-3.1-8b"
DEVICE = torch.device("cuda")
MAX_MODEL_LEN = 12288  # a prefix of 10,000 tokens and what follows it
SHARED = Spec(
    "shared-prefix", users=50, first_tokens=64, output_tokens=64, prefix_tokens=10_000, seed=1100
)
SECTIONS = ("link", "tiered", "hot", "disk", "resident", "resident-tiered")


class Suite:
    """What was measured so far, written after each run."""

    def __init__(
        self,
        out: Path | None,
        loaded: LoadedModel,
        options: dict[str, Any],
        only: tuple[str, ...] = ("",),
    ) -> None:
        self.loaded, self._out, self._options, self._only = loaded, out, options, only
        self.vocab_size: int = loaded.model.config.get_text_config().vocab_size
        self.record = record.start(model=MODEL, options=options, runs={})

    def keep(self, name: str, values: dict[str, Any]) -> None:
        """Add one result and write all."""
        self.record["runs"][name] = values
        record.write(self._out, self.record)

    @contextmanager
    def engine(self, **options: Any) -> Iterator[Engine]:
        """An engine that is warm and has all its host memory; its memory is free afterwards."""
        release(DEVICE)
        start_s = time.perf_counter()
        config = Options.of(
            max_num_batched_tokens=8192,
            max_model_len=MAX_MODEL_LEN,
            **{**self._options, **options},
        )
        engine = build_engine(config, self.loaded)
        started_s = time.perf_counter() - start_s
        ready_s = wait_for_host_tier(engine)
        spec = PRESETS["C6"].spec
        drive(engine, warm_up(spec, self.vocab_size, MAX_MODEL_LEN, is_small=False))
        print(f"engine started in {started_s:.1f} s, host memory {ready_s:.1f} s later", flush=True)
        gc.collect()
        gc.freeze()
        try:
            yield engine
        finally:
            gc.unfreeze()
            engine.close()
            del engine
            release(DEVICE)

    def run(self, name: str, engine: Engine, spec: Spec) -> None:
        """One workload; prints a line and keeps the figures."""
        if not name.startswith(self._only):
            return
        work = make_work(spec, self.vocab_size)
        if work.prefixes:
            drive(engine, prefix_work(work))
            hot_tokens = engine.sizes.device_blocks * engine.sizes.block_size
            drive(engine, filler(hot_tokens, 8192, self.vocab_size))
        before = copy.deepcopy(engine.metrics)
        driven = drive(engine, work)
        run = observe(name, 0, driven.play, driven.wall_s, is_complete=driven.is_complete)
        run.outputs.clear()
        run.engine = counters_since(before, engine)
        run.sizes = {"link_bytes_per_s": dict(engine.rates.link_bytes_per_s)}
        self.keep(name, run.as_dict() | {"workload": spec.as_dict()})
        ttft = run.latencies["ttft_s"]
        print(
            f"{name}: {run.wall_s:.2f} s, {run.total_tokens_per_s:,.0f} tokens/s, "
            f"{run.output_tokens_per_s:,.0f} of output, TTFT {ttft['mean']:.2f} mean "
            f"{ttft['p99']:.2f} p99, by turn {[round(t, 2) for t in run.ttft_by_turn_s]}, TPOT "
            f"{run.latencies['tpot_s']['mean'] * 1e3:.1f} ms, {run.engine['preemptions']} "
            f"preemptions, {run.engine['recomputed_tokens']} recomputed, "
            f"{run.engine['computed_tokens']} computed, moved {run.engine['moved_bytes']}, again "
            f"{run.engine['refetched_bytes']}, complete {run.is_complete} {run.first_error or ''}",
            flush=True,
        )


def link_rates(block_bytes: int, num_blocks: int = 4096) -> dict[str, float]:
    """GB/s of the engine's copier: up alone, down alone, both at once; blocks in random order."""
    values = block_bytes // 4  # keys and values of two bytes
    device = DeviceArena(
        [KeysValues(1, values, values)],
        num_blocks=num_blocks,
        block_size=1,
        dtype=torch.bfloat16,
        device=DEVICE,
    )
    host = HostArena(num_slots=num_blocks, block_bytes=device.block_bytes)
    copier = CudaCopier([device.memory], host)
    while copier.num_ready_slots < num_blocks:
        time.sleep(0.01)
    half = num_blocks // 2
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    runs = [
        Run(address, host.address(slot), num_bytes)
        for block, slot in zip(blocks, reversed(blocks), strict=True)
        for address, num_bytes in device.runs(block)
    ]
    found = {}
    for name, parts in (
        ("up", [(runs[:half], False)]),
        ("down", [(runs[half:], True)]),
        ("both", [(runs[:half], False), (runs[half:], True)]),
    ):
        for _ in range(2):  # the first one warms up
            copier.mark()
            torch.cuda.synchronize()
            start_s = time.perf_counter()
            open_ids = {copier.submit(part, to_host=to_host) for part, to_host in parts}
            while open_ids:
                copier.wait(1.0)
                open_ids -= {copy_id for copy_id, _ in copier.poll()}
            seconds = time.perf_counter() - start_s
        found[name] = len(parts) * half * device.block_bytes / seconds / 1e9
    copier.close()
    return found


def link(suite: Suite) -> None:
    for mib in (1, 2):
        rates = link_rates(mib * 2**20)
        release(DEVICE)
        suite.keep(f"link, {mib} MiB blocks", rates)
        print(f"link, {mib} MiB blocks: {rates}", flush=True)


def tiered(suite: Suite, specs: dict[str, Spec], rotation_s: float | None) -> None:
    with suite.engine(hot_gib=16, host_gib=64) as engine:
        suite.run("C6 host", engine, specs["C6"])
        suite.run("C3 host", engine, specs["C3"])
        suite.run("B host", engine, specs["B"])
        suite.run("shared prefix host", engine, SHARED)
        if rotation_s is not None:
            schedule = engine.options.schedule
            engine.scheduler.rotation_s = rotation_s
            engine.scheduler.max_mixed_tokens = (  # as an engine with `rotation_s` has it
                schedule.max_mixed_tokens or schedule.max_num_batched_tokens
            )
            suite.run("B host, rotation", engine, replace(specs["B"], seed=1102))


def hot(suite: Suite, specs: dict[str, Spec]) -> None:
    with suite.engine(hot_gib=16) as engine:
        suite.run("C6 hot", engine, specs["C6"])
        suite.run("C3 hot", engine, specs["C3"])
        suite.run("B hot", engine, specs["B"])
        suite.run("shared prefix hot", engine, SHARED)


def disk(suite: Suite, specs: dict[str, Spec]) -> None:
    """Contexts of 60 GiB over 24 GiB of host memory."""
    with (
        tempfile.TemporaryDirectory() as folder,
        suite.engine(hot_gib=16, host_gib=24, disk_gib=48, disk_path=Path(folder)) as engine,
    ):
        suite.run("C6 disk", engine, specs["C6"])


def resident(suite: Suite, specs: dict[str, Spec], hot_gib: float) -> None:
    with suite.engine(hot_gib=hot_gib) as engine:
        suite.run("A512", engine, specs["A512"])
        suite.run("A512 again", engine, replace(specs["A512"], seed=1200))
        suite.run("A4096", engine, specs["A4096"])


def resident_tiered(suite: Suite, specs: dict[str, Spec], hot_gib: float) -> None:
    with suite.engine(hot_gib=hot_gib, host_gib=40) as engine:
        suite.run("A512 host", engine, specs["A512"])
        suite.run("A512 host again", engine, replace(specs["A512"], seed=1200))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Those that `engine_options` reads."""
    parser.add_argument("--mixed-tokens", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="auto")


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """As `Options` names them."""
    return {
        "dtype": arguments.dtype,
        "kv_dtype": arguments.kv_dtype,
        "max_mixed_tokens": arguments.mixed_tokens,
    }


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--only", default="", help="Runs whose names begin with one of these.")
    add_engine_options(parser)
    parser.add_argument("--rotation-s", type=float, help="Run B once more with rotation.")
    parser.add_argument("--resident-gib", type=float, default=105.0)
    arguments = parser.parse_args()
    sections = arguments.sections.split(",")
    options = engine_options(arguments)
    loaded = load_dummy(MODEL, device="cuda", dtype=arguments.dtype)
    suite = Suite(arguments.out, loaded, options, tuple(arguments.only.split(",")))
    specs = {name: PRESETS[name].spec for name in ("A512", "A4096", "B", "C3", "C6")}
    # Each in a function of its own, so that nothing refers to an engine that is closed.
    if "link" in sections:
        link(suite)
    if "tiered" in sections:
        tiered(suite, specs, arguments.rotation_s)
    if "hot" in sections:
        hot(suite, specs)
    if "disk" in sections:
        disk(suite, specs)
    if "resident" in sections:
        resident(suite, specs, arguments.resident_gib)
    if "resident-tiered" in sections:
        resident_tiered(suite, specs, arguments.resident_gib)


if __name__ == "__main__":
    main()
