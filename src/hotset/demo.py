"""The demo: the same conversations with the hot tier alone, and with slower tiers under it.

Each user reads a text of Python's own documentation and asks about it turn by turn, in a closed
loop: a turn is the whole conversation so far and one more question, sent when the answer to the
last one is complete. All users go at once, and their contexts need several times the hot tier.
Both passes have the same model, hot tier, scheduler and prefix cache; only the tiers differ.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

from hotset.engine.build import build_engine
from hotset.engine.service import EngineService
from hotset.errors import EngineError
from hotset.executor.probe import ModelLayout, inspect_model
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import FinishReason, SamplingParams
from hotset.text.prompt import PromptEncoder
from hotset.units import GIB

HOT_ONLY, TIERED = "hot tier alone", "with tiers"

# Short answers to short questions: what a model of 135 million parameters does well.
QUESTIONS = (
    "What is it used for? Answer in one short sentence.",
    "What is the most important rule in this text? Answer in one short sentence.",
    "Explain it to a beginner in one short sentence.",
    "When would a programmer need it? Answer in one short sentence.",
    "Which word in this text is the most important?",
    "What should one be careful about? Answer in one short sentence.",
)
SYSTEM_PROMPT = "You answer questions about Python in one short sentence."

# Contexts over hot tier, host tier over contexts, disk tier over contexts: host memory holds
# about half of what leaves the hot tier, the disk all of it.
CONTEXTS_PER_HOT = 5.0
HOST_PER_CONTEXTS = 0.5
DISK_PER_CONTEXTS = 1.25
_LEAST_HOT_TOKENS = 320  # the engine takes no hot tier below 256


@dataclass(frozen=True, slots=True)
class Workload:
    """How much work the demo is.

    Attributes:
        document_tokens: of each user's text, at most; cut at the end of a line.
        answer_tokens: of each answer, at most.
    """

    users: int = 24
    turns: int = 4
    document_tokens: int = 720
    answer_tokens: int = 40


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass is."""

    name: str
    turns: int
    output_tokens: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer, as the client saw them.

    Attributes:
        gaps: for each token, the log probability of the likeliest less that of the second: near 0,
            rounding decides which is taken.
    """

    user: int
    turn: int
    title: str
    question: str
    answer: str
    is_complete: bool
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    gaps: tuple[float, ...]
    ttft_s: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One pass over the workload.

    Attributes:
        context_tokens: of all users' conversations at their end.
        hot_tokens: what the hot tier holds.
        computed_tokens: tokens that went through the model.
        recomputed_tokens: of these, all beyond once for each token with all before it.
        fetched_tokens: that came back from a slower tier instead.
        disk_read_tokens: read from disk into host memory; more than was fetched where blocks
            that were read ahead had to leave host memory again before their turn.
    """

    turns: list[Turn]
    wall_s: float
    context_tokens: int
    hot_tokens: int
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    fetched_tokens: int
    disk_read_tokens: int
    preemptions: int
    faults: dict[str, int]
    report: str

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all users a second."""
        return self.output_tokens / self.wall_s

    def ttft_s(self, quantile: float, *, first_turn: int = 0) -> float:
        """A quantile of the time from a question to the first token of its answer."""
        ordered = sorted(turn.ttft_s for turn in self.turns if turn.turn >= first_turn)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the prompts and gaps."""
        values = asdict(self)
        for turn in values["turns"]:
            turn["prompt_tokens"] = len(turn.pop("prompt_ids"))
            del turn["gaps"]
        return values | {
            "tokens_per_s": self.tokens_per_s,
            "ttft_s_p50": self.ttft_s(0.5),
            "ttft_s_p99": self.ttft_s(0.99),
        }


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both passes."""

    workload: Workload
    hot_only: RunResult
    tiered: RunResult

    @property
    def speedup(self) -> float:
        """Tokens a second with tiers over those of the hot tier alone."""
        return self.tiered.tokens_per_s / self.hot_only.tokens_per_s

    @property
    def differing(self) -> list[tuple[Turn, Turn]]:
        """The turns whose answers are other tokens in the second pass, with both of them."""
        return [
            (one, other)
            for one, other in zip(self.hot_only.turns, self.tiered.turns, strict=True)
            if one.token_ids != other.token_ids
        ]


def pick_documents(users: int) -> list[tuple[str, str]]:
    """Titles and texts of Python's documentation: the longest topics, a different one a user."""
    by_length = sorted(topics, key=lambda title: (-len(topics[title]), title))
    return [(title, topics[title]) for title in (by_length * -(-users // len(by_length)))[:users]]


def load_default_model() -> LoadedModel:
    """The default model in float32, so that the passes can be compared token by token."""
    return load_model(None, device="cpu", dtype="float32")


def run_demo(
    workload: Workload,
    progress: Callable[[Progress], None],
    *,
    load: Callable[[], LoadedModel] = load_default_model,
    fetch_policy: Literal["auto", "fetch", "recompute"] = "auto",
) -> DemoResult:
    """Run the workload with the hot tier alone, then with host and disk tiers under it.

    Args:
        workload: what the users do.
        progress: called as a pass starts to load, as its users start and with each output; from
            one thread at a time.
        load: loads the model; called once a pass.
        fetch_policy: see docs/options.md.

    Raises:
        HotsetError: the model cannot be had, a size cannot work, or a request failed.
    """
    config = Options.of(
        dtype="float32",
        device="cpu",
        max_num_batched_tokens=512,
        max_num_seqs=workload.users,
        fetch_policy=fetch_policy,
    )
    hot_only = _run(workload, config, load, HOT_ONLY, None, progress)
    with tempfile.TemporaryDirectory(prefix="hotset-demo-") as folder:
        tiered = _run(workload, config, load, TIERED, Path(folder), progress)
    return DemoResult(workload, hot_only, tiered)


def _longest_context(workload: Workload, encoder: PromptEncoder) -> int:
    """Tokens of a user's whole conversation, where every answer is as long as it may be."""
    question = max(QUESTIONS, key=len)
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for turn in range(workload.turns):
        content = question if turn else _opening(max(topics, key=len), "") + question
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": ""})
    around = len(encoder.encode_chat(messages))
    return around + workload.document_tokens + workload.turns * workload.answer_tokens


def _with_hot_tier(
    config: Options, workload: Workload, context_tokens: int, layout: ModelLayout
) -> Options:
    tokens = workload.users * context_tokens / CONTEXTS_PER_HOT
    # Few users: the hot tier must hold one of them all the same.
    tokens = max(tokens, context_tokens + 64, _LEAST_HOT_TOKENS)
    block_size, block_bytes = _block(config, layout)
    return config.but(hot_gib=(tokens // block_size + 0.5) * block_bytes / GIB)


def _with_slower_tiers(
    config: Options, workload: Workload, context_tokens: int, layout: ModelLayout, path: Path
) -> Options:
    block_size, block_bytes = _block(config, layout)
    blocks = -(-workload.users * context_tokens // block_size)
    return config.but(
        host_gib=(blocks * HOST_PER_CONTEXTS + 1) * slot_bytes_for(block_bytes) / GIB,
        disk_gib=(capacity_bytes_for(int(blocks * DISK_PER_CONTEXTS), block_bytes) + 1) / GIB,
        disk_path=path,
    )


def _block(config: Options, layout: ModelLayout) -> tuple[int, int]:
    """Tokens and bytes of a KV block."""
    block_size = config.memory.block_size or layout.default_block_size
    return block_size, block_size * layout.bytes_per_token


def _opening(title: str, text: str) -> str:
    return f'From the Python documentation, "{title}":\n\n{text}\n\n'


class _Pass:
    """What the users of one pass share."""

    def __init__(
        self, name: str, service: EngineService, progress: Callable[[Progress], None]
    ) -> None:
        self.name = name
        self.service = service
        self.encoder = PromptEncoder(service.model)
        self.start_s = time.perf_counter()
        self.error: str | None = None
        self._progress = progress
        self._lock = threading.Lock()
        self._turns = 0
        self._output_tokens = 0

    def count(self, *, output_tokens: int = 0, turns: int = 0) -> None:
        """Add to what is done and tell it."""
        with self._lock:
            self._turns += turns
            self._output_tokens += output_tokens
            wall_s = time.perf_counter() - self.start_s
            self._progress(Progress(self.name, self._turns, self._output_tokens, wall_s))

    def fail(self, error: str) -> None:
        """Note the first error; all users stop at their next turn."""
        with self._lock:
            self.error = self.error or error


def _run(
    workload: Workload,
    config: Options,
    load: Callable[[], LoadedModel],
    name: str,
    disk_path: Path | None,
    progress: Callable[[Progress], None],
) -> RunResult:
    progress(Progress(name, 0, 0, 0.0))
    loaded = load()
    layout = inspect_model(loaded.model)
    token_bytes = layout.bytes_per_token
    sizes = (workload, _longest_context(workload, PromptEncoder(loaded)))
    config = _with_hot_tier(config, *sizes, layout)
    if disk_path is not None:
        config = _with_slower_tiers(config, *sizes, layout, disk_path)
    service = EngineService(config, build=lambda config: (build_engine(config, loaded), loaded))
    try:
        one_pass = _Pass(name, service, progress)
        users = [
            _User(number, title, text, one_pass, workload)
            for number, (title, text) in enumerate(pick_documents(workload.users))
        ]
        threads = [threading.Thread(target=user.talk) for user in users]
        one_pass.start_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall_s = time.perf_counter() - one_pass.start_s
        if one_pass.error is not None:
            raise EngineError(f"demo, {name}: {one_pass.error}")
        turns = [turn for user in users for turn in user.turns]
        metrics = service.metrics
        # The last token of an answer is never computed.
        sequences = [turn.prompt_ids + turn.token_ids[:-1] for turn in turns]
        once = distinct_tokens(sequences)
        last_turns = [user.turns[-1] for user in users]
        return RunResult(
            turns=turns,
            wall_s=wall_s,
            context_tokens=sum(len(t.prompt_ids) + len(t.token_ids) for t in last_turns),
            hot_tokens=int(config.memory.hot_gib * GIB / token_bytes)
            if config.memory.hot_gib
            else 0,
            prompt_tokens=sum(len(turn.prompt_ids) for turn in turns),
            output_tokens=sum(len(turn.token_ids) for turn in turns),
            computed_tokens=metrics.computed_tokens,
            recomputed_tokens=metrics.computed_tokens - once,
            fetched_tokens=metrics.fetched_tokens,
            disk_read_tokens=metrics.moved_bytes["disk>host"] // token_bytes,
            preemptions=metrics.preemptions,
            faults=dict(metrics.faults),
            report=service.report,
        )
    finally:
        service.close()


def distinct_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """Tokens that must be computed once at least, where equal beginnings are shared."""
    after: dict[tuple[int, int], int] = {}  # (a beginning, the token that follows) -> beginning
    for ids in sequences:
        beginning = 0
        for token in ids:
            beginning = after.setdefault((beginning, token), len(after) + 1)
    return len(after)


class _User:
    """One user with one text, in a thread of its own."""

    def __init__(
        self, number: int, title: str, text: str, one_pass: _Pass, workload: Workload
    ) -> None:
        self.turns: list[Turn] = []
        self._number = number
        self._title = title
        self._pass = one_pass
        self._workload = workload
        encoder = one_pass.encoder
        ids = encoder.encode_text(text)[: workload.document_tokens]
        cut: str = one_pass.service.model.require_tokenizer().decode(ids)
        self._text = cut.rpartition("\n")[0] or cut

    def talk(self) -> None:
        """Ask every question; what goes wrong is told to the pass."""
        messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        opening = _opening(self._title, self._text)
        try:
            for turn in range(self._workload.turns):
                if self._pass.error is not None:
                    return
                question = QUESTIONS[(self._number + turn) % len(QUESTIONS)]
                content = question if turn else opening + question
                messages.append({"role": "user", "content": content})
                answer = self._ask(turn, question, messages)
                messages.append({"role": "assistant", "content": answer})
                self._pass.count(turns=1)
        except Exception as error:
            self._pass.fail(f"user {self._number + 1}: {error}")

    def _ask(self, turn: int, question: str, messages: list[dict[str, str]]) -> str:
        """Send the conversation and wait for its answer."""
        prompt_ids = self._pass.encoder.encode_chat(messages)
        params = SamplingParams(max_tokens=self._workload.answer_tokens, logprobs=2)
        token_ids: list[int] = []
        gaps: list[float] = []
        text, ttft_s, reason = "", 0.0, None
        sent_s = time.perf_counter()
        for output in self._pass.service.submit(prompt_ids, params):
            if output.token_ids and not token_ids:
                ttft_s = time.perf_counter() - sent_s
            token_ids += output.token_ids
            gaps += [token.top[0][1] - token.top[1][1] for token in output.logprobs]
            text += output.text
            reason = output.finish_reason
            if reason in (FinishReason.ERROR, FinishReason.ABORT):
                raise EngineError(output.error or "the request was aborted")
            self._pass.count(output_tokens=len(output.token_ids))
        self.turns.append(
            Turn(
                user=self._number,
                turn=turn,
                title=self._title,
                question=question,
                answer=text,
                is_complete=reason is FinishReason.STOP,
                prompt_ids=tuple(prompt_ids),
                token_ids=tuple(token_ids),
                gaps=tuple(gaps),
                ttft_s=ttft_s,
            )
        )
        return text
