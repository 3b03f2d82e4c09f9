"""Cold experts computed by the CPU, from the host copy, while the GPU computes resident ones.

For steps of few tokens: then an expert has one or a few rows, and the CPU reads its weights from
host memory faster than the link carries them. Source of the idea: KTransformers; Kamahori et al.,
"Fiddler", ICLR 2025.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.nn import functional

from hotset.cgroups import usable_cpus
from hotset.cost.cold_experts import MOST_TOKENS, ColdCost
from hotset.cost.tuning import TUNINGS
from hotset.experts.compute import gate
from hotset.experts.host import HostExperts
from hotset.experts.residency import SlotTable
from hotset.experts.weights import LayerExperts

_MEASURED_ROWS = (1, 4, 16)
_MEASURED_EXPERTS = 64


@dataclass(frozen=True, slots=True)
class ColdWork:
    """What the CPU computes of one layer's step.

    Attributes:
        places: positions in `[T * K]` of the rows that it computes.
        rows: `[len(places), H]` in host memory, the products; good when `futures` are done.
    """

    places: list[int]
    rows: torch.Tensor
    futures: list[Future[None]]

    def wait(self) -> torch.Tensor:
        """The rows, when they are computed. Raises what the computation raised."""
        for future in self.futures:
            future.result()
        return self.rows


class ColdExperts:
    """Computes experts of host memory in threads; the buffers are shared by all layers.

    One expert is one job of one thread: with products split over threads instead, 2 cores of an
    AMD EPYC took 4.3 ms for an expert of 2048 x 768 in bfloat16 and one row, and 0.68 this way.

    Args:
        hidden_size: H.
        top_k: K, the experts of a token.
        num_experts: E, of a layer.
        num_slots: S, of a layer.
        dtype: of hidden rows and weights.
        is_pinned: whether buffers are pinned, for copies to and from a GPU.
        mode: `on` for all steps of up to `MOST_TOKENS` tokens, `auto` for those where it pays.
        num_threads: None is one for each core that this process may use, but for the one that
            launches.

    Attributes:
        cost: what decides; None, and nothing is computed, until it was measured.
        is_paused: whether nothing is computed for now.
        num_computed: experts computed so far, over all layers.
    """

    def __init__(
        self,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        *,
        num_experts: int,
        num_slots: int,
        is_pinned: bool,
        mode: str,
        num_threads: int | None = None,
    ) -> None:
        self.num_threads = num_threads or max(1, usable_cpus() - 1)
        self.mode, self.top_k = mode, top_k
        self.num_experts, self.num_slots = num_experts, num_slots
        self._takes: dict[int, bool] = {}
        self.num_computed = 0
        self.cost: ColdCost | None = None
        self.is_paused = False
        self._pool = ThreadPoolExecutor(
            self.num_threads, "cold-expert", initializer=lambda: torch.set_num_threads(1)
        )
        self._hidden = torch.zeros(MOST_TOKENS, hidden_size, dtype=dtype, pin_memory=is_pinned)
        self._rows = torch.zeros(
            MOST_TOKENS * top_k, hidden_size, dtype=dtype, pin_memory=is_pinned
        )

    def takes(self, num_tokens: int) -> bool:
        """Whether the CPU takes part in steps of `num_tokens` tokens."""
        if self.cost is None or self.is_paused or num_tokens > MOST_TOKENS:
            return False
        if num_tokens not in self._takes:
            self._takes[num_tokens] = self.mode == "on" or self.cost.pays(
                num_tokens,
                top_k=self.top_k,
                num_experts=self.num_experts,
                num_slots=self.num_slots,
            )
        return self._takes[num_tokens]

    def describe(self) -> str:
        """One line for the start: what was measured, and what follows from it."""
        assert self.cost is not None
        by_rows = ", ".join(f"{seconds * 1e6:.0f} ({rows})" for rows, seconds in self.cost.cpu_s)
        taken = [count for count in range(1, MOST_TOKENS + 1) if self.takes(count)]
        steps = f"steps of {taken[0]} to {taken[-1]} tokens" if taken else "no step: it never pays"
        return (
            f"cold experts on the CPU, {self.mode}: {steps}; us for an expert: {by_rows} by rows "
            f"in {self.num_threads} threads, {self.cost.copy_s * 1e6:.0f} over the link; "
            f"{self.cost.layer_s * 1e6:.0f} more for a layer"
        )

    def bring(self, hidden: torch.Tensor) -> None:
        """Start to copy `[T, H]` to host memory; it is there once the stream has come so far."""
        self._hidden[: len(hidden)].copy_(hidden, non_blocking=True)

    def submit(self, layer: "ColdLayer", places_of: Mapping[int, Sequence[int]]) -> ColdWork:
        """Start to compute some experts of a layer, for what `bring` was given last.

        Args:
            layer: computes one.
            places_of: by expert, the positions in `[T * K]` of the rows that it computes.
        """
        places = [place for each in places_of.values() for place in each]
        rows = self._rows[: len(places)]
        tokens = torch.tensor(places) // self.top_k
        futures, start = [], 0
        for expert, each in places_of.items():
            end = start + len(each)
            self.num_computed += 1
            some = self._hidden, tokens[start:end], rows[start:end]
            futures.append(self._pool.submit(layer.compute, expert, *some))
            start = end
        return ColdWork(places, rows, futures)

    def measure(self, layer: "ColdLayer", copy: Callable[[int], None], sync_s: float) -> ColdCost:
        """Measure what a cold expert costs here and on the link, and keep it.

        Args:
            layer: computes its experts, all once before one is again: their weights should come
                from memory, not from a cache of the CPU.
            copy: copies a number of experts to the device, and waits for that.
            sync_s: what it takes to wait for the device once and copy to it.
        """
        count = min(_MEASURED_EXPERTS, self.num_experts)
        copy(count)
        copy_s = _seconds(lambda: copy(count)) / count
        points = []
        for rows in _MEASURED_ROWS:
            places = list(range(rows))  # in `[T * K]`: of one token after the other

            def compute(places: list[int] = places) -> None:
                # All write the same rows: only the time counts.
                jobs = [self.submit(layer, {expert: places}) for expert in range(count)]
                for job in jobs:
                    job.wait()

            compute()
            points.append((rows, _seconds(compute) / count))
        self.num_computed = 0
        self.cost = ColdCost(copy_s, tuple(points), sync_s + TUNINGS["cuda"].launched_layer_s)
        return self.cost

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class ColdLayer:
    """What the CPU does in the steps of one layer.

    Args:
        shared: computes.
        table: says which experts have slots.
        experts: of the layer, in host memory; biases, if they have some, are copied there.
        can_copy: whether cold experts may be copied to slots too.
    """

    def __init__(
        self,
        shared: ColdExperts,
        table: SlotTable,
        experts: LayerExperts,
        *,
        can_copy: bool,
    ) -> None:
        assert isinstance(experts.source, HostExperts)
        self.shared = shared
        self._host = experts.source
        self._table, self._experts, self._can_copy = table, experts, can_copy
        names = experts.names if experts.has_bias else ()
        self._biases = [getattr(experts.module, f"{name}_bias").detach().cpu() for name in names]

    def begin(
        self, hidden: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, ColdWork | None]:
        """Start to compute on the CPU what costs less there; waits for the device.

        Args:
            hidden: `[T, H]` on the device.
            ids: `[T * K]` expert ids.

        Returns:
            the ids that are left to the device, the others E, which is no expert's; and the work.
        """
        shared, num_experts = self.shared, self._table.num_experts
        shared.bring(hidden)
        numbers: list[int] = torch.cat([ids, self._table.slots()]).tolist()
        wanted, slots = numbers[: len(ids)], numbers[len(ids) :]
        places_of: dict[int, list[int]] = {}
        for place, expert in enumerate(wanted):
            if expert < num_experts and slots[expert] < 0:
                places_of.setdefault(expert, []).append(place)
        cold = sorted(places_of, key=lambda expert: (-len(places_of[expert]), expert))
        copied = 0
        if self._can_copy and shared.cost is not None:
            copied = shared.cost.num_copied([len(places_of[e]) for e in cold])
        computed = {expert: places_of[expert] for expert in cold[copied:]}
        if not computed:
            return ids, None
        work = shared.submit(self, computed)
        left = [num_experts if expert in computed else expert for expert in wanted]
        return torch.tensor(left, dtype=ids.dtype).to(ids.device, non_blocking=True), work

    @torch.inference_mode()
    def compute(
        self, expert: int, hidden: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor
    ) -> None:
        """In a thread: one expert's rows, in the order of `tokens`, into `out`."""
        experts = self._experts

        def product(which: int, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            weight = weight.t() if self._host.layout.is_transposed else weight
            return functional.linear(
                rows, weight, self._biases[which][expert] if self._biases else None
            )

        (up,), (down,) = self._host.matrices(slice(expert, expert + 1))
        rows = product(0, hidden[tokens], up)
        out.copy_(product(1, gate(experts.module, experts, rows), down))

    def finish(self, rows: torch.Tensor, work: ColdWork) -> None:
        """Put what the CPU computed into its places of `rows`, `[T * K, H]`, on the device."""
        computed = work.wait().to(rows.device, non_blocking=True).to(rows.dtype)
        places = torch.tensor(work.places).to(rows.device, non_blocking=True)
        rows.index_copy_(0, places, computed)

    def weighted(self, work: ColdWork, weights: torch.Tensor) -> torch.Tensor:
        """`[T, H]`, the part of the CPU in each token's sum; `weights` is `[T, K]`."""
        num_tokens, top_k = weights.shape
        rows = work.rows.new_zeros(
            num_tokens * top_k, work.rows.shape[1], dtype=torch.float32, device=weights.device
        )
        self.finish(rows, work)
        summed: torch.Tensor = (rows.view(num_tokens, top_k, -1) * weights.unsqueeze(-1)).sum(1)
        return summed


def device_seconds(device: torch.device) -> float:
    """What it takes to read a few numbers from the device and to write some, once each way."""
    numbers = torch.zeros(256, dtype=torch.int64, device=device)

    def once() -> None:
        values = numbers.tolist()
        numbers.copy_(torch.tensor(values))

    once()
    return min(_seconds(once) for _ in range(10))


def _seconds(run: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s
