"""Playing a workload: which request is due, and when its tokens came.

Used by the driver of the engine and by the client of a server alike.
"""

from array import array
from collections import defaultdict, deque
from dataclasses import dataclass, field

from hotset.bench.workload import Session, Work
from hotset.request import FinishReason, RequestOutput


@dataclass(eq=False, slots=True)
class Said:
    """A question in a conversation, and its answer.

    Attributes:
        title: of the text that the conversation is about.
        prompt: tokens of the whole conversation up to the answer.
        has_stopped: whether the model ended the answer itself.
        gaps: per token, log probability of the likeliest minus log probability of the second; near
            0, rounding decides which is taken.
    """

    title: str
    question: str
    prompt: list[int]
    answer: str = ""
    has_stopped: bool = False
    gaps: list[float] = field(default_factory=list)

    def take(self, output: RequestOutput) -> None:
        """Add what an engine put out; it was asked for the two likeliest tokens."""
        self.answer += output.text
        self.gaps += [token.top[0][1] - token.top[1][1] for token in output.logprobs]
        self.has_stopped = output.finish_reason is FinishReason.STOP


@dataclass(eq=False, slots=True)
class Record:
    """One request as its client saw it. Times are seconds from the start of the run.

    Attributes:
        session: index of its session in the work.
        turn: number of the turn, for results by turn.
        sent_s: when it was due: in an open loop, waiting in the client counts.
        num_tokens: of the answer so far.
        said: what was asked and answered, where the work is text.
    """

    session: int
    turn: int
    prompt_tokens: int
    sent_s: float
    first_s: float | None = None
    last_s: float = 0.0
    end_s: float | None = None
    num_tokens: int = 0
    token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    error: str | None = None
    said: Said | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it ended well."""
        return self.end_s is not None and self.error is None


@dataclass(slots=True)
class Due:
    """A request to send now.

    Attributes:
        seed: None where the answer is greedy.
    """

    record: Record
    prompt: list[int]
    output_tokens: int
    seed: int | None = None


class Play:
    """The state of a run: sessions that have not arrived, turns that are due, records.

    A session whose request fails sends no further ones.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.records: list[Record] = []
        self.gaps_s = array("d")  # between consecutive outputs of a request, pooled
        self.num_ended = 0
        self.num_failed = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self._arrivals = deque(
            sorted(range(len(work.sessions)), key=lambda i: work.sessions[i].arrival_s)
        )
        self._next: deque[tuple[int, int, float]] = deque()  # session, turn of it, due
        self._contexts: dict[int, list[int]] = {}
        self._answers: defaultdict[int, list[str]] = defaultdict(list)
        self._num_open = 0

    @property
    def is_over(self) -> bool:
        """Whether every request has ended and none is to come."""
        return not (self._arrivals or self._next or self._num_open)

    @property
    def num_open(self) -> int:
        """Requests that were sent and have not ended."""
        return self._num_open

    def next_arrival_s(self) -> float | None:
        """When the next session arrives; None: all have."""
        return self._session(self._arrivals[0]).arrival_s if self._arrivals else None

    def take_due(self, now_s: float) -> Due | None:
        """The next request to send, if one is due."""
        if self._next:
            index, number, due_s = self._next.popleft()
        elif self._arrivals and self._session(self._arrivals[0]).arrival_s <= now_s:
            index, number = self._arrivals.popleft(), 0
            due_s = self._session(index).arrival_s
        else:
            return None
        session = self._session(index)
        turn = session.turns[number]
        said = [self._answers[index]] if self.work.is_text else []
        prompt = turn.make_tokens(*said)
        if turn.extends:
            prompt = self._contexts[index] + prompt
        if number + 1 < len(session.turns) and session.turns[number + 1].extends:
            self._contexts[index] = list(prompt)
        record = Record(index, session.first_turn + number, len(prompt), due_s)
        if self.work.is_text:
            record.said = Said(session.title, turn.question, prompt)
        self.records.append(record)
        self._num_open += 1
        seed = self.work.sampling_seed(index, number)
        return Due(record, prompt, turn.output_tokens, seed)

    def on_tokens(self, record: Record, token_ids: tuple[int, ...], now_s: float) -> None:
        """Tokens of an answer have come."""
        if record.first_s is None:
            record.first_s = now_s
        else:
            self.gaps_s.append(now_s - record.last_s)
        record.last_s = now_s
        record.num_tokens += len(token_ids)
        record.token_ids.extend(token_ids)

    def on_end(self, record: Record, now_s: float, error: str | None = None) -> None:
        """A request has ended; the next one of its session is due."""
        record.end_s, record.error = now_s, error
        self._num_open -= 1
        self.num_ended += 1
        if error is not None:
            self.num_failed += 1
            self._contexts.pop(record.session, None)
            return
        self.prompt_tokens += record.prompt_tokens
        self.output_tokens += record.num_tokens
        session = self._session(record.session)
        number = record.turn - session.first_turn + 1
        if record.said is not None:
            self._answers[record.session].append(record.said.answer)
        if number < len(session.turns):
            if session.turns[number].extends:
                self._contexts[record.session].extend(record.token_ids)
            self._next.append((record.session, number, now_s))
        else:
            self._contexts.pop(record.session, None)

    def _session(self, index: int) -> Session:
        return self.work.sessions[index]
