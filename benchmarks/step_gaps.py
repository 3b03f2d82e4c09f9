"""What the GPU does in consecutive steps of a running workload, and when no kernel runs.

A preset over Llama-3.1-8B with 16 GiB of KV on the GPU and 64 GiB in host memory. Nothing waits
for the profiler within a window, so that steps overlap as they always do. By window: how long no
kernel ran, by what came before and after, and the time of each kernel; those of two streams
overlap.

    python benchmarks/step_gaps.py --at 20,500,800 --out benchmarks/results/gpu_h200_gaps.txt
    python benchmarks/step_gaps.py --preset B --dtype fp8 --kv-dtype fp8 --rotation-s 1 --out FILE
"""

from collections import Counter
from typing import Any

import record
import torch
from gpu_suite import MODEL, Suite, add_engine_options, engine_options
from torch.profiler import ProfilerActivity, profile

from hotset.bench.driver import drive
from hotset.bench.presets import PRESETS
from hotset.bench.workload import make_work
from hotset.executor.step_input import StepInput
from hotset.model.dummy import load_dummy

NUM_STEPS = 16
NUM_LINES = 20
COPIES = ("Memcpy HtoD", "Memcpy DtoH")


class Watch:
    """Profiles windows of steps; `lines` is what was found."""

    def __init__(self, forward: Any, first_steps: list[int]) -> None:
        self.lines: list[str] = []
        self._forward, self._first_steps = forward, first_steps
        self._num_seen = self._first = 0
        self._steps: list[StepInput] = []
        self._profile: Any = None

    def __call__(self, step: StepInput, *args: Any) -> torch.Tensor:
        """Stands for `ModelRunner.forward`."""
        self._num_seen += 1
        if self._profile is not None and self._num_seen == self._first + NUM_STEPS:
            torch.cuda.synchronize()
            self._profile.stop()
            self._describe(self._profile.profiler.kineto_results.events())
            self._profile = None
        if self._num_seen in self._first_steps:
            self._first, self._steps = self._num_seen, []
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.start()
        if self._profile is not None:
            self._steps.append(step)
        logits: torch.Tensor = self._forward(step, *args)
        return logits

    def _describe(self, events: Any) -> None:
        kernels = sorted(
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in events
            if str(event.device_type()).endswith("CUDA") and not event.name().startswith(COPIES)
        )
        took: Counter[str] = Counter()
        idle: Counter[str] = Counter()
        end_ns, before = kernels[0][0], ""
        for start_ns, stop_ns, name in kernels:
            took[name[:100]] += stop_ns - start_ns
            if start_ns > end_ns:
                idle[f"{before[:50]} -> {name[:50]}"] += start_ns - end_ns
            if stop_ns > end_ns:
                end_ns, before = stop_ns, name
        tokens = [step.num_tokens for step in self._steps]
        per_step = 1e6 * NUM_STEPS
        self.lines += [
            f"## Steps {self._first} to {self._first + NUM_STEPS - 1}, of {tokens} tokens: "
            f"{(end_ns - kernels[0][0]) / per_step:.2f} ms each, no kernel for "
            f"{idle.total() / per_step:.2f}",
            *(f"{ns / per_step:8.3f} ms idle  {name}" for name, ns in idle.most_common(NUM_LINES)),
            *(f"{ns / per_step:8.3f} ms  {name}" for name, ns in took.most_common(NUM_LINES)),
        ]


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--at", default="20,500,800", help="First steps of windows.")
    parser.add_argument("--preset", default="C6", choices=PRESETS)
    add_engine_options(parser)
    parser.add_argument("--rotation-s", type=float)
    arguments = parser.parse_args()
    loaded = load_dummy(MODEL, device="cuda", dtype=arguments.dtype)
    options = engine_options(arguments) | {"rotation_s": arguments.rotation_s}
    suite = Suite(None, loaded, options)
    with suite.engine(hot_gib=16, host_gib=64) as engine:
        runner = engine.executor.runner  # type: ignore[attr-defined]
        watch = Watch(runner.forward, [int(step) for step in arguments.at.split(",")])
        runner.forward = watch
        drive(engine, make_work(PRESETS[arguments.preset].spec, suite.vocab_size))
    lines = [record.footer(suite.record), *watch.lines]
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(watch.lines))


if __name__ == "__main__":
    main()
