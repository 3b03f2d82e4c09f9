"""What is sent: sessions of turns, made from a few figures and a seed, or from a trace.

Every session is known before the first request is sent, so that all arms get the same work, in
whatever order their requests end.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hotset.errors import ConfigError
from hotset.option_fields import Bounds, Group, option

if TYPE_CHECKING:
    from hotset.model.loaded import LoadedModel

TEXTS = ("documents", "questions")  # workloads whose prompts are text
_ONE, _MANY = Bounds("1 or more", 1), Bounds("1 or more", 1, 10**7)
_FACTOR = Bounds("a factor above 0", 0, 1e6, is_open=True)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    Attributes:
        make_tokens: makes the new tokens of its prompt; called as it is sent, as those of a trace
            are too many to keep. In text it takes the session's answers so far, and makes all.
        num_tokens: how many these are; in text, where the answers before are as long as can be.
        output_tokens: the exact length of the answer; in text the greatest.
        extends: whether the prompt is the session so far, with its answers, and the new tokens;
            the new tokens alone otherwise.
        known_tokens: leading tokens of the prompt that any session sent or was answered before.
        question: in text, what is asked.
    """

    make_tokens: Callable[..., list[int]]
    num_tokens: int
    output_tokens: int
    extends: bool = False
    known_tokens: int = 0
    question: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one user: each is sent when the one before has ended.

    Attributes:
        arrival_s: when the first is sent, from the start.
        first_turn: number of its first turn, for results by turn.
        title: of the text that it is about.
    """

    turns: tuple[Turn, ...]
    arrival_s: float = 0.0
    first_turn: int = 0
    title: str = ""

    def prompt_lengths(self) -> list[int]:
        """Tokens of each turn's prompt."""
        lengths, context = [], 0
        for turn in self.turns:
            prompt = turn.num_tokens + (context if turn.extends else 0)
            lengths.append(prompt)
            context = prompt + turn.output_tokens
        return lengths

    @property
    def longest_context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        pairs = zip(self.prompt_lengths(), self.turns, strict=True)
        return max(prompt + turn.output_tokens for prompt, turn in pairs)


@dataclass(frozen=True, slots=True)
class Work:
    """All that is sent in a run.

    Attributes:
        title: one line for reports.
        kv_tokens: distinct tokens, prompts and answers: what all tiers together would have to
            hold so that nothing is computed twice.
        contexts_per_hot: `kv_tokens` over the hot tier, where no size is given; None leaves KV all
            that is free.
        prefixes: sent once each before the run, and not measured.
        is_open_loop: whether arrivals are by the clock.
        num_skipped: requests of a trace that were left out because they are too long.
        temperature: of all requests; 0 is greedy.
        seed: what the seeds of sampled requests are made from.
        is_text: whether prompts are text and answers end where the model ends them.
    """

    title: str
    sessions: tuple[Session, ...]
    kv_tokens: int
    contexts_per_hot: float | None = 4.0
    prefixes: tuple[tuple[int, ...], ...] = ()
    is_open_loop: bool = False
    num_skipped: int = 0
    temperature: float = 0.0
    seed: int = 0
    is_text: bool = False

    def sampling_seed(self, session: int, turn: int) -> int | None:
        """The seed of one request, the same in every run; None where answers are greedy."""
        if self.temperature == 0:
            return None
        return random.Random(f"{self.seed} {session} {turn}").getrandbits(32)

    @property
    def num_requests(self) -> int:
        """Turns of all sessions."""
        return sum(len(session.turns) for session in self.sessions)

    @property
    def longest_context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(session.longest_context for session in self.sessions)


@dataclass(frozen=True, slots=True)
class Spec(Group):
    """The figures a workload is made from. See `docs/bench.md` for what each means in which.

    Raises:
        ConfigError: a figure that its field does not take, or a trace without its file.
    """

    workload: Literal[
        "unshared", "pressure", "multiturn", "shared-prefix", "trace", "documents", "questions"
    ] = option("unshared", "What the sessions are like.", has_flag=False)
    users: int = option(16, "Sessions at once.", bounds=_MANY)
    turns: int = option(1, "Requests of a session, one after the other.", bounds=_MANY)
    first_tokens: int = option(
        256, "Prompt of a first turn (beside a shared prefix).", bounds=_MANY
    )
    new_tokens: int = option(64, "What a later turn of `multiturn` adds.", bounds=_ONE)
    output_tokens: int = option(32, "Answer of each turn, exactly; in text at most.", bounds=_MANY)
    temperature: float = option(0.0, "Of sampling; 0 is greedy.", bounds=Bounds("0 to 100", 0, 100))
    seed: int = option(1000, "Of prompts, arrivals and sampling.")
    rate_per_s: float | None = option(
        None,
        "Sessions per second, at random.",
        bounds=Bounds("requests a second, above 0", 0, 1e6, is_open=True),
        otherwise="all at once",
        flag="--rate",
    )
    prefix_tokens: int = option(512, "`shared-prefix`: length of a prefix.", bounds=_ONE)
    num_prefixes: int = option(1, "`shared-prefix`: how many.", bounds=_MANY, flag="--prefixes")
    trace: Path | None = option(None, "`trace`: its file.", has_flag=False)
    max_sessions: int | None = option(
        None, "`trace`: pick this many conversations.", bounds=_ONE, flag="--sessions"
    )
    time_scale: float = option(
        1.0, "`trace`: multiplies times; 0.1 is ten times as fast.", bounds=_FACTOR
    )
    length_scale: float = option(1.0, "`trace`: multiplies lengths.", bounds=_FACTOR)

    def __post_init__(self) -> None:
        Group.__post_init__(self)
        if (self.workload == "trace") != (self.trace is not None):
            raise ConfigError("the workload `trace` needs a file, and only it takes one")

    def as_dict(self) -> dict[str, Any]:
        """Plain data for results, without what the workload does not use."""
        unused = {
            "unshared": ("new_tokens", "prefix_tokens", "num_prefixes"),
            "pressure": ("new_tokens", "prefix_tokens", "num_prefixes"),
            "multiturn": ("prefix_tokens", "num_prefixes"),
            "shared-prefix": ("turns", "new_tokens"),
            "documents": ("new_tokens", "prefix_tokens", "num_prefixes"),
            "questions": ("turns", "first_tokens", "new_tokens", "prefix_tokens", "num_prefixes"),
            "trace": (
                *("users", "turns", "first_tokens", "new_tokens", "output_tokens", "rate_per_s"),
                *("prefix_tokens", "num_prefixes"),
            ),
        }[self.workload]
        if self.workload != "trace":
            unused += ("trace", "max_sessions", "time_scale", "length_scale")
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values = {name: value for name, value in values.items() if name not in unused}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def token_range(vocab_size: int) -> tuple[int, int]:
    """Ids that prompts are drawn from: [1000, vocab - 1000), or the middle of a small vocabulary.

    The ends of a vocabulary are special tokens and single bytes.
    """
    margin = 1000 if vocab_size >= 4000 else vocab_size // 4
    return margin, vocab_size - margin


def make_work(
    spec: Spec,
    vocab_size: int,
    *,
    max_context: int | None = None,
    model: "LoadedModel | None" = None,
) -> Work:
    """The sessions of a workload.

    Args:
        spec: what is asked for.
        vocab_size: of the model.
        max_context: longest context the model serves; what is longer in a trace is left out, any
            other workload is refused.
        model: whose tokenizer reads text.

    Raises:
        ConfigError: a context is too long, a trace cannot be read, or text has no tokenizer.
    """
    if spec.workload == "trace":
        from hotset.bench.trace import trace_work

        return _sampled(trace_work(spec, vocab_size, max_context=max_context), spec)
    if spec.workload in TEXTS:
        from hotset.bench.text_work import text_work

        work = text_work(spec, model)
    else:
        work = _MAKERS[spec.workload](spec, _drawing(spec.seed, vocab_size))
    if max_context is not None and work.longest_context > max_context:
        raise ConfigError(
            f"the workload has contexts of {work.longest_context} tokens but the model and its "
            f"memory serve {max_context}; give fewer tokens or turns, or more hot_gib"
        )
    return _sampled(_with_arrivals(work, spec), spec)


def _drawing(seed: int, vocab_size: int) -> Callable[[int], list[int]]:
    """A function that draws a number of tokens; each call goes on where the last one ended."""
    low, high = token_range(vocab_size)
    rng = random.Random(seed)
    return lambda count: [rng.randrange(low, high) for _ in range(count)]


def _sampled(work: Work, spec: Spec) -> Work:
    """With the temperature of the spec, which the title names where it is not 0."""
    if spec.temperature == 0:
        return work
    title = f"{work.title}; temperature {spec.temperature:g}"
    return replace(work, title=title, temperature=spec.temperature, seed=spec.seed)


def _given(tokens: list[int]) -> Callable[[], list[int]]:
    return partial(list, tokens)


def _unshared(spec: Spec, draw: Callable[[int], list[int]]) -> Work:
    def turn() -> Turn:
        return Turn(_given(draw(spec.first_tokens)), spec.first_tokens, spec.output_tokens)

    sessions = tuple(Session(tuple(turn() for _ in range(spec.turns))) for _ in range(spec.users))
    num_requests = spec.users * spec.turns
    return Work(
        f"{spec.workload}: {num_requests} requests of {spec.first_tokens} / {spec.output_tokens} "
        f"tokens, {spec.users} at once, nothing shared",
        sessions,
        num_requests * (spec.first_tokens + spec.output_tokens),
        contexts_per_hot=4.0 if spec.workload == "pressure" else None,
    )


def _multiturn(spec: Spec, draw: Callable[[int], list[int]]) -> Work:
    turns: list[list[Turn]] = [[] for _ in range(spec.users)]
    context = 0
    for number in range(spec.turns):
        count = spec.new_tokens if number else spec.first_tokens
        for user in turns:
            made = _given(draw(count))
            user.append(Turn(made, count, spec.output_tokens, number > 0, known_tokens=context))
        context += count + spec.output_tokens
    return Work(
        f"multiturn: {spec.users} users, {spec.turns} turns, first {spec.first_tokens}, "
        f"+{spec.new_tokens} a turn, {spec.output_tokens} out",
        tuple(Session(tuple(user)) for user in turns),
        spec.users * context,
    )


def _shared_prefix(spec: Spec, draw: Callable[[int], list[int]]) -> Work:
    prefixes = tuple(tuple(draw(spec.prefix_tokens)) for _ in range(spec.num_prefixes))
    sessions = []
    for user in range(spec.users):
        tokens = [*prefixes[user % spec.num_prefixes], *draw(spec.first_tokens)]
        known = spec.prefix_tokens
        sessions.append(
            Session((Turn(_given(tokens), len(tokens), spec.output_tokens, known_tokens=known),))
        )
    own = spec.users * (spec.first_tokens + spec.output_tokens)
    return Work(
        f"shared-prefix: {spec.users} requests on {spec.num_prefixes} prefixes of "
        f"{spec.prefix_tokens} tokens that lie in the slowest tier, {spec.first_tokens} own, "
        f"{spec.output_tokens} out",
        tuple(sessions),
        own + spec.num_prefixes * spec.prefix_tokens,
        contexts_per_hot=1.0,  # so that the requests that share one can run at once
        prefixes=prefixes,
    )


_MAKERS = {
    "unshared": _unshared,
    "pressure": _unshared,
    "multiturn": _multiturn,
    "shared-prefix": _shared_prefix,
}


def _with_arrivals(work: Work, spec: Spec) -> Work:
    """Sessions arrive at once, or with exponential gaps (a Poisson process)."""
    if spec.rate_per_s is None:
        return work
    rng = random.Random(spec.seed + 1)
    now_s, sessions = 0.0, []
    for session in work.sessions:
        now_s += rng.expovariate(spec.rate_per_s)
        sessions.append(replace(session, arrival_s=now_s))
    title = f"{work.title}; {spec.rate_per_s:g} sessions a second"
    return replace(work, title=title, sessions=tuple(sessions), is_open_loop=True)


def prefix_work(work: Work) -> Work:
    """Each shared prefix once, with one token of answer."""
    turns = [Turn(_given(list(prefix)), len(prefix), 1) for prefix in work.prefixes]
    num_tokens = sum(turn.num_tokens + 1 for turn in turns)
    return Work("prefixes", tuple(Session((turn,)) for turn in turns), num_tokens)


def filler(num_tokens: int, max_context: int, vocab_size: int) -> Work:
    """Unshared prompts of about `num_tokens` tokens together, to push all else out of a tier."""
    count = -(-num_tokens // max(1, min(2048, max_context - 2)))
    length = -(-num_tokens // count)
    spec = Spec("unshared", users=count, first_tokens=length, output_tokens=1, seed=7)
    return make_work(spec, vocab_size)


def warm_up(spec: Spec, vocab_size: int, max_context: int, *, is_small: bool) -> Work:
    """A small wave of two turns before the run: what is compiled and allocated once is there.

    `is_small` is for devices that compile nothing, and for which tokens are dear.
    """
    most_users, most_tokens = (2, 64) if is_small else (16, 512)
    output = max(1, min(4 if is_small else 16, spec.output_tokens, max_context // 8))
    return make_work(
        Spec(
            "multiturn",
            users=min(most_users, spec.users),
            turns=2,
            first_tokens=max(1, min(most_tokens, max_context // 2 - 2 * output)),
            new_tokens=max(1, min(32, max_context // 8)),
            output_tokens=output,
            temperature=spec.temperature,
            seed=11,
        ),
        vocab_size,
    )
