"""What the cost model expects of an arm: the planner's arithmetic on the bench's workload."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from hotset.bench.workload import Turn, Work
from hotset.cost.expert_steps import ExpertCost, Load, link_of
from hotset.cost.prefix import split_prefix
from hotset.cost.rates import Rates
from hotset.cost.step_time import PREFILL_CHUNK, CostModel
from hotset.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Prediction:
    """Expected figures of a run. The parts are summed over the run, and may overlap.

    Attributes:
        wall_s: in each turn compute or the link, whichever takes longer; never less than the
            last arrival.
        ttft_s: mean over all requests, see `_ttft_s`; None where arrivals are by the clock.
    """

    hardware: str
    wall_s: float
    total_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: float | None
    prefill_s: float
    decode_s: float
    link_s: float
    computed_tokens: float
    fetched_tokens: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class BufferedExperts:
    """Experts of which some are in host memory.

    Attributes:
        cost: of steps.
        num_slots: of each layer.
    """

    cost: ExpertCost
    num_slots: int

    def prefill_s(self, tokens: float, max_step_tokens: float) -> float:
        """Time of one prompt, in steps of at most `max_step_tokens`."""
        load = Load(1, tokens, 1, num_requests=1)
        size = min(tokens, max_step_tokens)
        return tokens / size * self.cost.prompt_step(self.num_slots, size, load).seconds


def _ttft_s(wall_s: float, prefill_s: float, running: float, *, is_burst: bool) -> float:
    """Mean time to first token of a turn that all users take in `wall_s`.

    Of all users the share `running` decodes at a time. In a closed loop a user is back after
    `wall_s` (Little's law: users over requests a second) and waits while the others run. In a
    burst, all come at once and wait half of that on average. Those that need not wait for others
    to end do for half of the prefill.
    """
    waiting_s = wall_s * (1 - running) / (2 if is_burst else 1)
    return waiting_s + prefill_s * running / 2


@dataclass(frozen=True, slots=True)
class _Turns:
    """What the sessions that take one turn have in common, by their means.

    Attributes:
        count: of sessions.
        prompt: tokens of all prompts and answers so far, with the new ones.
        known: of these, tokens of earlier turns or of a shared prefix.
        output: tokens of the answer.
    """

    count: int
    prompt: float
    known: float
    output: float


@dataclass(frozen=True, slots=True)
class _TurnTime:
    """How long a turn of all its sessions takes; see `Prediction`."""

    prefill_s: float
    decode_s: float
    link_s: float
    computed: float
    fetched: float
    running: float  # share of the sessions that run at once

    @property
    def wall_s(self) -> float:
        """Compute or the link, whichever takes longer."""
        return max(self.prefill_s + self.decode_s, self.link_s)


@dataclass(frozen=True, slots=True)
class _Machine:
    """The arguments of `predict`, for one turn after another."""

    cost: CostModel
    work: Work
    hot_tokens: int
    host_tokens: int
    disk_tokens: int
    max_num_seqs: int
    max_batched_tokens: int
    experts: BufferedExperts | None

    def time(self, turns: _Turns) -> _TurnTime:
        """How long a turn takes."""
        cost, count, output = self.cost, turns.count, turns.output
        bytes_per_token = cost.shape.kv_bytes_per_token(cost.kv_dtype, tp=cost.layout.tp)
        found, cold, link = self._find(turns)
        again = self._compute_again(cold, count, bytes_per_token, link)
        new = turns.prompt - found + again
        at_once, prefill_s, decode_s = self._compute(turns, new)
        fetched = count * (cold - again)
        link_s = fetched * bytes_per_token / link
        if self.host_tokens:  # what is new goes down beside it
            down_s = count * (new + output) * bytes_per_token / cost.link_bytes_per_s()
            link_s = max(link_s, down_s)
        computed = count * (new + output)
        return _TurnTime(prefill_s, decode_s, link_s, computed, fetched, at_once / count)

    def _find(self, turns: _Turns) -> tuple[float, int, float]:
        """Tokens that a session finds, those of them below the device, and these tiers' rate."""
        work, count, known = self.work, turns.count, turns.known
        kept = count * (turns.prompt + turns.output)
        if work.prefixes:
            kept = float(work.kv_tokens)
        held = float(kept <= max(self.hot_tokens, self.host_tokens, self.disk_tokens))
        warm = float(kept <= self.hot_tokens)
        found = known * held
        cold = int(found * (1 - warm / held)) if held else 0
        if work.prefixes:  # they were pushed out of the device before the run
            in_tiers = min(1.0, (self.host_tokens + self.disk_tokens) / kept)
            num_prefix = len(work.prefixes) * len(work.prefixes[0])
            cold = int(num_prefix * in_tiers / count)  # all requests share one load
            found = known if in_tiers == 1 else known - num_prefix / count
        link = self.cost.link_bytes_per_s()
        if cold and self.disk_tokens and self.host_tokens < (kept - self.hot_tokens) * 0.99:
            link = self.cost.disk_bytes_per_s()
        return found, cold, link

    def _compute_again(self, cold: int, count: int, bytes_per_token: int, link: float) -> int:
        """Of `cold` tokens of a session, how many are computed and not fetched."""
        if not cold:
            return 0
        if self.experts is not None:
            all_s = self.experts.prefill_s(cold, self.max_batched_tokens)
        else:
            all_s = self.cost.prefill_s(cold)
        return split_prefix(
            Rates(cold / all_s, {"below": link}),
            cold,
            ["below"],
            bytes_per_token=bytes_per_token,
            others_run=count > 1,
        ).computed_tokens

    def _compute(self, turns: _Turns, new: float) -> tuple[float, float, float]:
        """Sessions that run at once; seconds for `new` tokens of all prompts and for answers."""
        cost, count, prompt, output = self.cost, turns.count, turns.prompt, turns.output
        if self.experts is not None:
            served = self.experts.cost.serve(
                self.experts.num_slots,
                Load(self.max_num_seqs, max(1.0, new), output, prompt - new, num_requests=count),
                kv_tokens=self.hot_tokens,
                max_step_tokens=self.max_batched_tokens,
            )
            return served.at_once, served.prompt_s, served.decode_s
        chunk = min(PREFILL_CHUNK, self.max_batched_tokens)
        together = max(1, min(count, int(chunk // max(1.0, new))))
        one_s = cost.prefill_s(new, prompt - new, sequences=together, chunk=chunk) / together
        at_once = max(1.0, min(count, self.max_num_seqs, self.hot_tokens / (prompt + output)))
        step_s = cost.decode(at_once, prompt + output / 2).expected_s
        return at_once, count * one_s, count * output / at_once * step_s


def predict(
    cost: CostModel,
    work: Work,
    *,
    hot_tokens: int,
    host_tokens: int,
    disk_tokens: int,
    max_num_seqs: int,
    max_batched_tokens: int,
    experts: BufferedExperts | None = None,
) -> Prediction:
    """Expected figures of `work` with tiers of these sizes.

    Sessions come back in the order in which they went, and the least recently used are evicted. So
    a tier that holds the contexts of all finds everything again, and a smaller one nothing. Tokens
    found below the device are fetched, or computed where that is faster. With `experts`, how many
    steps prompts and answers take is what counts: each brings experts over the link.
    """
    machine = _Machine(
        cost,
        work,
        hot_tokens,
        host_tokens,
        disk_tokens,
        max_num_seqs,
        max_batched_tokens,
        experts,
    )
    turns = _turns_of(work)
    times = [machine.time(one) for one in turns]
    # The first turn is a burst: all its sessions begin at once.
    ttft_sum = sum(
        one.count * _ttft_s(time.wall_s, time.prefill_s, time.running, is_burst=i == 0)
        for i, (one, time) in enumerate(zip(turns, times, strict=True))
    )
    num_prompt = sum(one.count * one.prompt for one in turns)
    num_output = sum(one.count * one.output for one in turns)
    last_arrival_s = max(session.arrival_s for session in work.sessions)
    wall_s = max(sum(time.wall_s for time in times), last_arrival_s)
    return Prediction(
        hardware=cost.hardware.name,
        wall_s=wall_s,
        total_tokens_per_s=(num_prompt + num_output) / wall_s,
        output_tokens_per_s=num_output / wall_s,
        ttft_s=None if work.is_open_loop else ttft_sum / max(1, work.num_requests),
        prefill_s=sum(time.prefill_s for time in times),
        decode_s=sum(time.decode_s for time in times),
        link_s=sum(time.link_s for time in times),
        computed_tokens=sum(time.computed for time in times),
        fetched_tokens=sum(time.fetched for time in times),
    )


def _turns_of(work: Work) -> list[_Turns]:
    """One for each number of a turn, in order."""
    by_turn: dict[int, list[tuple[int, Turn]]] = defaultdict(list)
    for session in work.sessions:
        for number, pair in enumerate(zip(session.prompt_lengths(), session.turns, strict=True)):
            by_turn[session.first_turn + number].append(pair)
    return [
        _Turns(
            len(pairs),
            fmean(length for length, _ in pairs),
            fmean(turn.known_tokens for _, turn in pairs),
            fmean(turn.output_tokens for _, turn in pairs),
        )
        for _, pairs in sorted(by_turn.items())
    ]


def predict_arm(
    cost: CostModel, work: Work, engine: Engine, sizes: dict[str, Any], counters: dict[str, Any]
) -> dict[str, Any]:
    """Expected figures of an arm; of experts in host memory also those of the hit rate of the run.

    Args:
        cost: of the model.
        work: that was run.
        engine: of the arm.
        sizes: see `figures.sizes_of`.
        counters: of the run, see `figures.counters_since`.
    """
    schedule, buffer = engine.options.schedule, engine.experts

    def expected(hit_rate: float | None) -> dict[str, Any]:
        experts, max_step_tokens = None, schedule.max_num_batched_tokens
        if buffer is not None:
            max_step_tokens = min(max_step_tokens, engine.sizes.max_mixed_tokens)
            link = link_of(cost, cold_bytes=buffer.sizes.cold_bytes, hit_rate=hit_rate)
            experts = BufferedExperts(ExpertCost(cost, link, buffer.sizes.plan), buffer.num_slots)
        found = predict(
            cost,
            work,
            hot_tokens=sizes["hot_tokens"],
            host_tokens=sizes["host_tokens"],
            disk_tokens=sizes["disk_tokens"],
            max_num_seqs=schedule.max_num_seqs,
            max_batched_tokens=max_step_tokens,
            experts=experts,
        )
        return found.as_dict()

    found, hit_rate = expected(None), counters["expert_hit_rate"]
    if buffer is not None and hit_rate is not None:
        names = ("wall_s", "total_tokens_per_s", "output_tokens_per_s")
        measured = expected(hit_rate)
        found["at_hit_rate"] = {"hit_rate": hit_rate} | {name: measured[name] for name in names}
    return found
