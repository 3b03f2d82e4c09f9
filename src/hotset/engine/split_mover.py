"""Moving the boundary between experts and KV while requests run."""

import logging
from statistics import fmean

from hotset.clock import Clock
from hotset.cost.expert_split import Split
from hotset.cost.expert_steps import Load
from hotset.cost.split_policy import SplitPolicy
from hotset.engine.memory_split import MovingSplit
from hotset.engine.scheduler import Scheduler
from hotset.experts.buffer import ExpertBuffer
from hotset.kv.pool import BlockPool
from hotset.memory.arena import DeviceArena
from hotset.units import GIB

_log = logging.getLogger(__name__)

_OBSERVE_S = 0.5


class SplitMover:
    """Has the split between experts and KV follow the load, between steps and without a wait.

    Slots are given up at once: blocks in their memory are written by what is submitted later. A
    slot is taken in use with its expert of each layer, one slot per step, once no block in its
    memory is held and running requests have what they need beside it: no request is preempted.
    """

    def __init__(
        self,
        moving: MovingSplit,
        experts: ExpertBuffer,
        arena: DeviceArena,
        pool: BlockPool,
        scheduler: Scheduler,
        clock: Clock,
    ) -> None:
        self._region = moving.region
        self._policy = SplitPolicy(moving.splitter, moving.load)
        self._experts, self._arena, self._scheduler = experts, arena, scheduler
        self._pool, self._metrics = pool, scheduler.metrics
        self._clock = clock
        self._observe_from_s = 0.0
        self._target = experts.num_slots
        self._try()
        self._note_bytes()

    def step(self, *, num_queued: int) -> None:
        """Move as far as can be. To be called between two steps; more requests wait elsewhere."""
        now_s = self._clock.now()
        if now_s >= self._observe_from_s:
            self._observe_from_s = now_s + _OBSERVE_S
            self._follow(now_s, num_queued)
        if self._target != self._experts.num_slots:
            self._advance()

    def aim(self, num_slots: int) -> None:
        """Move to `num_slots` slots of each layer, in this step and the next ones."""
        self._target = num_slots
        self._metrics.split_moves += 1
        self._pool.hand_out_last(max(self._pool.first, self._region.first_block(num_slots)))

    def _try(self) -> None:
        """Move there and back, before anybody is served: kernels are compiled by that."""
        now, region = self._experts.num_slots, self._region
        other = now - 1 if now > region.fewest_slots else now + 1
        self._experts.resize(other)
        self._experts.resize(now)
        self._arena.clear_blocks(region.first_block(now), region.first_block(max(now, other)))

    def _follow(self, now_s: float, num_queued: int) -> None:
        load = self._seen(num_queued)
        if load is None:
            return
        self._policy.observe(now_s, load)
        move = self._policy.choose(now_s, self._target)
        if move is not None:
            load = move.load
            _log.info(
                "the split moves for %.0f users of %.0f + %.0f tokens, from %s to %s",
                *(load.users, load.prompt_tokens, load.output_tokens),
                *(_described(move.old), _described(move.new)),
            )
            self.aim(move.new.num_slots)

    def _seen(self, num_queued: int) -> Load | None:
        """The load now; None where there is none."""
        requests = [*self._scheduler.running, *self._scheduler.waiting]
        if not requests:
            return None
        users = min(len(requests) + num_queued, self._scheduler.max_num_seqs)
        outputs = [  # on average half of an answer is there
            min(2 * request.num_output_tokens, request.max_total_tokens - request.prompt_len)
            for request in requests
            if request.num_output_tokens
        ]
        output = fmean(outputs) if outputs else self._policy.load.output_tokens
        return Load(users, fmean(r.prompt_len for r in requests), output)

    def _advance(self) -> None:
        now, pool = self._experts.num_slots, self._pool
        if self._target < now:
            first = self._region.first_block(self._target)
            self._experts.resize(self._target)
            self._arena.clear_blocks(first, pool.first)
            pool.take_back(first)
        else:
            first = self._region.first_block(now + 1)
            num_left = pool.num_available - (first - pool.first)
            if num_left < self._scheduler.num_blocks_ahead or not pool.lend(first):
                return
            self._experts.resize(now + 1)
        self._note_bytes()

    def _note_bytes(self) -> None:
        self._metrics.split_expert_bytes = self._experts.device_bytes
        self._metrics.split_kv_bytes = self._pool.num_usable * self._region.block_bytes


def _described(split: Split) -> str:
    served = split.served
    return (
        f"{split.num_slots} slots a layer ({split.expert_bytes / GIB:.3f} GiB, KV "
        f"{split.kv_bytes / GIB:.3f} GiB, predicted {served.output_tokens_per_s:,.0f} output "
        f"tokens/s, a decode step {served.decode_step.seconds * 1e3:,.1f} ms)"
    )
