"""The demo of expert buffering: the same questions with all experts resident, and with a quarter.

Several users ask at once. Both passes have the same model, scheduler and KV; in the second, each
layer keeps a quarter of its experts in slots and reads the others from host memory when a step
needs them. On a CPU both are the same memory: what is shown would cross the link to a device.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hotset.bench.expert_arms import expert_sizes
from hotset.engine.build import build_engine
from hotset.errors import EngineError, ModelError
from hotset.executor.probe import inspect_model
from hotset.experts.gating import unpack_experts
from hotset.experts.weights import experts_layers
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.model.upcycled_model import NAME
from hotset.options import Options
from hotset.request import FinishReason, SamplingParams
from hotset.text.prompt import PromptEncoder
from hotset.units import GIB

ALL, QUARTER = "all experts", "a quarter of them"

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write one sentence about the sea.",
    "What is 2 + 3?",
    "Name three fruits.",
    "What do bees make?",
    "How many days has a week?",
    "Describe a cat in one sentence.",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """How much work the demo is.

    Attributes:
        users: who all ask at once, one question each.
        answer_tokens: of each answer, at most.
    """

    users: int = 4
    answer_tokens: int = 48


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass is."""

    name: str
    output_tokens: int
    wall_s: float


@dataclass(slots=True)
class Answer:
    """What a user got. `is_complete`: whether the model ended it itself."""

    question: str
    text: str
    token_ids: list[int]
    is_complete: bool


@dataclass(frozen=True, slots=True)
class PassResult:
    """One pass over the workload.

    Attributes:
        hits: experts that a layer needed in a step, and that had a slot.
        misses: those that had none, and were copied into one.
        moved_bytes: of experts, to slots.
        device_bytes: of experts in slots, or of all.
        host_bytes: of experts in host memory.
    """

    answers: list[Answer]
    wall_s: float
    prompt_tokens: int
    hits: int
    misses: int
    moved_bytes: int
    device_bytes: int
    host_bytes: int
    report: str

    @property
    def output_tokens(self) -> int:
        """Of all users."""
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all users a second."""
        return self.output_tokens / self.wall_s

    @property
    def hit_rate(self) -> float | None:
        """Hits over all experts that were needed; None where nothing is looked for."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {
            "output_tokens": self.output_tokens,
            "tokens_per_s": self.tokens_per_s,
            "hit_rate": self.hit_rate,
        }


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Both passes, over `num_experts` experts in each of `num_layers` layers."""

    workload: Workload
    model: str
    num_layers: int
    num_experts: int
    num_slots: int
    all_here: PassResult
    quarter: PassResult

    @property
    def differing(self) -> list[int]:
        """Numbers of the users whose answers are other tokens in the second pass."""
        pairs = zip(self.all_here.answers, self.quarter.answers, strict=True)
        return [i for i, (one, other) in enumerate(pairs) if one.token_ids != other.token_ids]


def load_upcycled() -> LoadedModel:
    """The upcycled model in float32, so that the passes can be compared token by token."""
    return load_model(NAME, device="cpu", dtype="float32")


def run_demo(
    workload: Workload,
    progress: Callable[[Progress], None],
    *,
    load: Callable[[], LoadedModel] = load_upcycled,
) -> DemoResult:
    """Ask all questions with all experts resident, then with a quarter of them.

    Args:
        workload: what the users do.
        progress: called as a pass starts, and after each step that had outputs.
        load: loads the model, once.

    Raises:
        HotsetError: the model cannot be had, has no experts, or a request failed.
    """
    progress(Progress(ALL, 0, 0.0))
    loaded = load()
    encoder = PromptEncoder(loaded)
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(workload.users)]
    prompts = [encoder.encode_chat([{"role": "user", "content": text}]) for text in questions]
    longest = max(map(len, prompts)) + workload.answer_tokens
    token_bytes = inspect_model(loaded.model).bytes_per_token
    layers = experts_layers(loaded.model)
    if not layers:
        raise ModelError(f"{loaded.name} has no experts that can be kept in host memory")
    num_experts = layers[0].num_experts
    num_slots = max(1, num_experts // 4)
    config = Options.of(
        dtype="float32",
        device="cpu",
        max_num_seqs=workload.users,
        max_num_batched_tokens=512,
        expert_slots=num_experts,
        hot_gib=max(512, workload.users * (longest + 32)) * token_bytes / GIB,
        prefix_caching=False,
    )
    all_here = _run(ALL, config, loaded, workload, questions, prompts, progress)
    unpack_experts(loaded.model)
    progress(Progress(QUARTER, 0, 0.0))
    few = config.but(expert_slots=num_slots, expert_plan="cache")
    quarter = _run(QUARTER, few, loaded, workload, questions, prompts, progress)
    return DemoResult(workload, loaded.name, len(layers), num_experts, num_slots, all_here, quarter)


def _run(
    name: str,
    config: Options,
    loaded: LoadedModel,
    workload: Workload,
    questions: list[str],
    prompts: list[list[int]],
    progress: Callable[[Progress], None],
) -> PassResult:
    engine = build_engine(config, loaded)
    try:
        params = SamplingParams(max_tokens=workload.answer_tokens)
        answers = {}
        start_s = time.perf_counter()
        for question, prompt in zip(questions, prompts, strict=True):
            answers[engine.add_request(prompt, params)] = Answer(question, "", [], False)
        done = 0
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                    raise EngineError(
                        f"demo-moe, {name}: {output.error or 'a request was aborted'}"
                    )
                answer = answers[output.request_id]
                answer.text += output.text
                answer.token_ids += output.token_ids
                answer.is_complete = output.finish_reason is FinishReason.STOP
                done += len(output.token_ids)
            progress(Progress(name, done, time.perf_counter() - start_s))
        wall_s = time.perf_counter() - start_s
        engine.count_experts()
        metrics, sizes = engine.metrics, expert_sizes(engine, loaded.model)
        return PassResult(
            answers=list(answers.values()),
            wall_s=wall_s,
            prompt_tokens=sum(map(len, prompts)),
            hits=metrics.expert_hits,
            misses=metrics.expert_misses,
            moved_bytes=metrics.expert_bytes,
            device_bytes=sizes["experts_device_bytes"],
            host_bytes=sizes["experts_host_bytes"],
            report=engine.report,
        )
    finally:
        engine.close()
