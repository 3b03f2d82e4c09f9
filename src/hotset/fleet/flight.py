"""One request of a front, from replica to replica: what was delivered of it, and its losses."""

import math
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from hotset.engine.messages import Submit
from hotset.fleet.route import Choice
from hotset.fleet.status import GivenUp
from hotset.request import FinishReason, RequestOutput, Resumed

if TYPE_CHECKING:
    from hotset.fleet.replica import Replica

# How often a request may lose its replica before its first token, and after it.
_MOST_RETRIES, _MOST_RESUMES = 3, 2
# A request that was running on this number of replicas that died is taken for the cause.
_POISON = 2


def with_seed(submit: Submit) -> Submit:
    """The request with a seed where it draws tokens and has none: another replica can go on."""
    params = submit.params
    if params.temperature == 0.0 or params.seed is not None:
        return submit
    return replace(submit, params=replace(params, seed=random.getrandbits(53)))


class Kind(NamedTuple):
    """What the tokens of an answer depend on beside its request.

    Attributes:
        fingerprint, numerics: see `EngineInfo`.
    """

    fingerprint: str
    numerics: str


@dataclass(eq=False, slots=True)
class Flight:
    """A request that has not ended.

    Each attempt has an id of its own at its replica, so that outputs of another one are known by
    it, and dropped: what was delivered is delivered once.

    Attributes:
        asked: as it came.
        deadline_s: when it must have ended.
        token_ids: what was delivered, of each output that has not ended.
        kind: of the replica that began the answer; None before the first token.
        attempt: the last one; 0 before the first.
        replica: where it is.
        sent: the last message, at `sent_s`, and `choice` why it went there.
        lost_on: replicas that were lost with it.
        is_placing: a thread looks for a replica, or it waits for one. `must_move` tells the thread
            that it has left a replica meanwhile.
        wait_until_s: when it ends if no replica takes it before.
        was_accepted: by a replica, so that it ends with an output and not with an exception.
        last_s: when its last tokens came; 0 before.
        is_paused: it has left a replica in the middle of its answer, and no token has come since.
    """

    asked: Submit
    deadline_s: float | None
    token_ids: dict[int, list[int]] = field(init=False)
    kind: Kind | None = None
    attempt: int = 0
    replica: "Replica | None" = None
    sent: Submit = field(init=False)
    sent_s: float = 0.0
    choice: Choice | None = None
    lost_on: set[str] = field(default_factory=set)
    is_placing: bool = True
    must_move: bool = False
    wait_until_s: float = math.inf
    was_accepted: bool = False
    last_s: float = 0.0
    is_paused: bool = False
    _is_running: bool = False  # a step may have it
    _moved: set[int] = field(default_factory=set)  # outputs that have left the replica
    _num_losses: int = 0
    _num_deaths: int = 0  # of replicas while it was running there
    _has_prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        self.sent = self.asked
        self.token_ids = {index: [] for index in range(self.asked.params.n)}

    @property
    def is_over(self) -> bool:
        """Whether all outputs have ended."""
        return not self.token_ids

    @property
    def has_left(self) -> bool:
        """Whether its replica has given up all outputs that have not ended."""
        return self._moved >= self.token_ids.keys()

    @property
    def has_begun(self) -> bool:
        """Whether something of its answer was delivered."""
        return self.kind is not None

    @property
    def too_late(self) -> str:
        """What is said where the deadline has passed."""
        return f"the request was not done within its {self.asked.timeout_s:g} s"

    def depart(self, now_s: float) -> Submit:
        """The message for the next replica."""
        self.attempt += 1
        self.must_move = self._is_running = False
        self._moved.clear()
        params, limit, timeout_s = self.asked.params, self.asked.queue_limit, None
        if self._has_prompt_logprobs:
            params = replace(params, prompt_logprobs=None)
        if self.was_accepted:
            limit = None
        if self.deadline_s is not None:
            timeout_s = max(0.0, self.deadline_s - now_s)
        resumed = [Resumed(index, tuple(ids)) for index, ids in self.token_ids.items()]
        self.sent = replace(
            self.asked,
            request_id=f"{self.asked.request_id}~{self.attempt}",
            params=params,
            timeout_s=timeout_s,
            queue_limit=limit,
            resumed=resumed if self.has_begun else (),
        )
        self.sent_s = now_s
        return self.sent

    def run(self) -> None:
        """A step may have the request from now on."""
        self._is_running = True

    def accept(self, output: RequestOutput, kind: Kind, now_s: float) -> RequestOutput | None:
        """Take an output of the present attempt; returns what to deliver of it."""
        ids = self.token_ids.get(output.index)
        if ids is None:
            return None
        self._is_running = True
        ids += output.token_ids
        if output.token_ids:
            self.last_s, self.is_paused = now_s, False
        if output.prompt_logprobs:
            self._has_prompt_logprobs = True
        reason = output.finish_reason
        if reason is FinishReason.ABORT and output.error is not None:
            output = output._replace(error=self.too_late)  # of all attempts
        if reason is FinishReason.MOVED:
            self._moved.add(output.index)
            reason = None
        elif reason is not None:
            del self.token_ids[output.index]
        if output.token_ids or output.prompt_logprobs or reason is not None:
            self.kind = kind
        elif not output.text:
            return None
        return output._replace(request_id=self.asked.request_id, finish_reason=reason)

    def lose(self, replica_id: str, *, has_died: bool) -> GivenUp | None:
        """Its replica is lost; returns why it is not submitted again, if it is not.

        A replica of which nothing is heard may be well: only one that `has_died` says something of
        the request.
        """
        self.lost_on.add(replica_id)
        self._num_losses += 1
        self._num_deaths += self._is_running and has_died
        if self._num_deaths >= _POISON:
            return GivenUp.POISONED
        most = _MOST_RESUMES if self.has_begun else _MOST_RETRIES
        return GivenUp.RETRIES if self._num_losses > most else None

    def end(
        self, reason: FinishReason, error: str | None, code: str | None = None
    ) -> list[RequestOutput]:
        """End what has not ended; returns the last outputs."""
        ended, self.token_ids = list(self.token_ids), {}
        return [
            RequestOutput(self.asked.request_id, index, "", (), reason, error, code=code)
            for index in ended
        ]
