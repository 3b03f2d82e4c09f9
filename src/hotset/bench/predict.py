"""What the cost model expects of an arm: the planner's arithmetic on the bench's workload."""

from collections import defaultdict
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from hotset.bench.workload import Turn, Work
from hotset.cost.expert_steps import ExpertCost, Load
from hotset.cost.prefix import bring_prefix
from hotset.cost.rates import Rates
from hotset.cost.step_time import PREFILL_CHUNK, CostModel


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
    """Expected figures of `work` with tiers that hold so many tokens.

    Sessions come back in the order in which they went, so that of least recently used tiers one
    that holds the contexts of all finds everything again, and a smaller one nothing. What is
    found below the device is fetched, or computed where that is faster. With `experts`, how many
    steps prompts and answers take is what counts: each brings experts over the link.
    """
    bytes_per_token = cost.shape.kv_bytes_per_token(cost.kv_dtype)
    by_turn: dict[int, list[tuple[int, Turn]]] = defaultdict(list)
    for session in work.sessions:
        for number, pair in enumerate(zip(session.prompt_lengths(), session.turns, strict=True)):
            by_turn[session.first_turn + number].append(pair)
    chunk = min(PREFILL_CHUNK, max_batched_tokens)
    num_prompt = num_output = 0
    prefill_s = decode_s = link_s = wall_s = computed = fetched = 0.0
    ttft_sum = 0.0
    for number, pairs in by_turn.items():
        count = len(pairs)
        prompt = fmean(length for length, _ in pairs)
        known = fmean(turn.known_tokens for _, turn in pairs)
        output = fmean(turn.output_tokens for _, turn in pairs)
        kept = count * (prompt + output) if not work.prefixes else float(work.kv_tokens)
        held = float(kept <= max(hot_tokens, host_tokens, disk_tokens))
        warm = float(kept <= hot_tokens)
        found = known * held
        cold = int(found * (1 - warm / held)) if held else 0
        if work.prefixes:  # they were pushed out of the device before the run
            in_tiers = min(1.0, (host_tokens + disk_tokens) / kept)
            num_prefix = len(work.prefixes) * len(work.prefixes[0])
            cold = int(num_prefix * in_tiers / count)  # all requests share one load
            found = known if in_tiers == 1 else known - num_prefix / count
        link = cost.link_bytes_per_s()
        if cold and host_tokens < (kept - hot_tokens) * 0.99:
            link = cost.disk_bytes_per_s() if disk_tokens else link
        again = 0
        if cold:
            if experts is not None:
                all_s = experts.prefill_s(cold, max_batched_tokens)
            else:
                all_s = cost.prefill_s(cold)
            again = bring_prefix(
                Rates(cold / all_s, {"below": link}),
                cold,
                ["below"],
                bytes_per_token=bytes_per_token,
                others_run=count > 1,
            )
        new = prompt - found + again
        together = max(1, min(count, int(chunk // max(1.0, new))))
        one_s = cost.prefill_s(new, prompt - new, sequences=together, chunk=chunk) / together
        at_once = max(1.0, min(count, max_num_seqs, hot_tokens / (prompt + output)))
        step_s = cost.decode(at_once, prompt + output / 2).expected_s
        steps_s = count * output / at_once * step_s
        if experts is not None:
            load = Load(max_num_seqs, max(1.0, new), output, prompt - new, num_requests=count)
            served = experts.cost.serve(
                experts.num_slots,
                load,
                kv_tokens=hot_tokens,
                max_step_tokens=max_batched_tokens,
            )
            at_once, one_s, steps_s = served.at_once, served.prompt_s / count, served.decode_s
        loaded = count * (cold - again)
        turn_link_s = loaded * bytes_per_token / link
        if host_tokens:  # what is new goes down beside it
            down_s = count * (new + output) * bytes_per_token / cost.link_bytes_per_s()
            turn_link_s = max(turn_link_s, down_s)
        prefill_s += count * one_s
        decode_s += steps_s
        link_s += turn_link_s
        turn_wall_s = max(count * one_s + steps_s, turn_link_s)
        wall_s += turn_wall_s
        computed += count * (new + output)
        fetched += loaded
        is_burst = number == min(by_turn)
        ttft_sum += count * _ttft_s(turn_wall_s, count * one_s, at_once / count, is_burst=is_burst)
        num_prompt += int(sum(length for length, _ in pairs))
        num_output += int(sum(turn.output_tokens for _, turn in pairs))
    wall_s = max(wall_s, max(session.arrival_s for session in work.sessions))
    return Prediction(
        hardware=cost.hardware.name,
        wall_s=wall_s,
        total_tokens_per_s=(num_prompt + num_output) / wall_s,
        output_tokens_per_s=num_output / wall_s,
        ttft_s=None if work.is_open_loop else ttft_sum / max(1, work.num_requests),
        prefill_s=prefill_s,
        decode_s=decode_s,
        link_s=link_s,
        computed_tokens=computed,
        fetched_tokens=fetched,
    )
