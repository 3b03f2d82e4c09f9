"""The engine against transformers on the CPU: 16 users at once, the default model, greedy.

Three ways to serve the same prompts with the same number of tokens:

- `hotset`: this engine.
- `generate_batch`: transformers' own continuous batching, its cache allocated and its manager
  started before the clock, its prompts submitted at once.
- `generate`: transformers' `generate`, called user by user.

All run in one process, warmed up first, in an order that rotates with each repeat. Each finds
the machine as the others do; nobody caches prefixes across repeats.

    python benchmarks/cpu_engine.py --out benchmarks/results/cpu_engine

writes `.json` and `.md`.
"""

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import record
import torch
import transformers

from hotset.engine.build import build_engine
from hotset.engine.run import run_to_end
from hotset.model import default_model
from hotset.model.checkpoint import load_gguf
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import SamplingParams

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write a haiku about the sea.",
    "Explain what a mutex is.",
    "How do vaccines work?",
    "List three uses of copper.",
    "What is photosynthesis?",
    "Tell me a short story about a fox.",
    "How do I boil an egg?",
    "What is a prime number?",
    "Who wrote Hamlet?",
    "What causes tides?",
    "Describe the water cycle.",
    "What is inflation?",
    "How does a bicycle stay upright?",
    "Give advice for a first job interview.",
    "What is the difference between a virus and a bacterium?",
    "Explain recursion to a child.",
    "Why do leaves change colour in autumn?",
    "What does a compiler do?",
)
HOT_GIB = 1.0


@dataclass(slots=True)
class Run:
    """One way's answers to all prompts, and when each user had the last token."""

    tokens: list[list[int]]
    wall_s: float
    finished_s: list[float]


Serve = Callable[[list[list[int]], int], Run]


def serve_hotset(loaded: LoadedModel, users: int) -> Serve:
    config = Options.of(hot_gib=HOT_GIB, max_num_seqs=users, prefix_caching=False)
    engine = build_engine(config, loaded)

    def serve(prompts: list[list[int]], num_tokens: int) -> Run:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        start_s = time.perf_counter()
        ids = [engine.add_request(prompt, params) for prompt in prompts]
        tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
        finished_s: dict[str, float] = {}
        for output in run_to_end(engine):
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                finished_s[output.request_id] = time.perf_counter() - start_s
        wall_s = time.perf_counter() - start_s
        return Run([tokens[i] for i in ids], wall_s, [finished_s[i] for i in ids])

    return serve


def serve_generate_batch(loaded: LoadedModel, num_tokens: int) -> tuple[Serve, Callable[[], None]]:
    generation = transformers.GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=loaded.eos_token_ids[0],
    )
    # As much KV memory as the engine has, so that nobody is short of it or allocates all memory.
    page_size = 256
    config = loaded.model.config
    kv_values_per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    )
    batching = transformers.ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=int(HOT_GIB * 2**30 / (4 * kv_values_per_token * page_size)),
        max_batch_tokens=2048,
    )
    manager = loaded.model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=batching
    )
    manager.start()

    def serve(prompts: list[list[int]], num_tokens: int) -> Run:
        start_s = time.perf_counter()
        ids = [manager.add_request(prompt, max_new_tokens=num_tokens) for prompt in prompts]
        tokens: dict[str, list[int]] = {}
        finished_s: dict[str, float] = {}
        while len(tokens) < len(prompts):
            result = manager.get_result(timeout=60)
            if result is None or result.error is not None:
                raise RuntimeError(f"generate_batch failed: {result and result.error}")
            if result.is_finished():
                tokens[result.request_id] = list(result.generated_tokens)
                finished_s[result.request_id] = time.perf_counter() - start_s
        wall_s = time.perf_counter() - start_s
        return Run([tokens[i] for i in ids], wall_s, [finished_s[i] for i in ids])

    return serve, lambda: manager.stop(block=True)


def serve_generate(loaded: LoadedModel) -> Serve:
    def serve(prompts: list[list[int]], num_tokens: int) -> Run:
        start_s = time.perf_counter()
        tokens, finished_s = [], []
        for prompt in prompts:
            output = loaded.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=loaded.eos_token_ids[0],
            )
            tokens.append(output[0, len(prompt) :].tolist())
            finished_s.append(time.perf_counter() - start_s)
        return Run(tokens, time.perf_counter() - start_s, finished_s)

    return serve


def widened(loaded: LoadedModel) -> LoadedModel:
    """The default model as transformers reads its file, in float32."""
    model, *_ = load_gguf(default_model.ensure_gguf(), torch.device("cpu"), torch.float32)
    return replace(loaded, model=model.eval())


def make_prompts(loaded: LoadedModel, users: int, seed: int) -> list[list[int]]:
    questions = random.Random(seed).choices(QUESTIONS, k=users)
    if users <= len(QUESTIONS):
        questions = random.Random(seed).sample(QUESTIONS, users)
    tokenizer = loaded.require_tokenizer()
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]


def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()

    loaded = load_model(None, device="cpu", dtype="float32")
    prompts = make_prompts(loaded, args.users, args.seed)
    batch_serve, stop_batch = serve_generate_batch(widened(loaded), args.output_tokens)
    ways: dict[str, Serve] = {
        "hotset": serve_hotset(loaded, args.users),
        "generate_batch": batch_serve,
        "generate": serve_generate(widened(loaded)),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    try:
        for name, serve in ways.items():
            print(f"warming up {name}", file=sys.stderr)
            serve(prompts[:2], min(8, args.output_tokens))
        for repeat in range(args.repeats):
            names = list(ways)
            for name in names[repeat % 3 :] + names[: repeat % 3]:
                runs[name].append(run := ways[name](prompts, args.output_tokens))
                print(f"repeat {repeat + 1} {name}: {run.wall_s:.2f} s", file=sys.stderr)
    finally:
        stop_batch()

    reference = runs["generate"][0].tokens
    total_tokens = args.users * args.output_tokens
    wall_s = {name: statistics.median(r.wall_s for r in of) for name, of in runs.items()}
    result = record.start(
        model=loaded.name,
        dtype="float32",
        seed=args.seed,
        users=args.users,
        prompt_tokens=[len(prompt) for prompt in prompts],
        output_tokens_per_user=args.output_tokens,
        repeats=args.repeats,
        ways={
            name: {
                "wall_s": [r.wall_s for r in of],
                "wall_s_median": wall_s[name],
                "tokens_per_s_median": total_tokens / wall_s[name],
                "user_finished_s": record.percentiles([s for r in of for s in r.finished_s]),
                "users_with_tokens_of_generate": [
                    sum(a == b for a, b in zip(r.tokens, reference, strict=True)) for r in of
                ],
                "times_slower_than_hotset": wall_s[name] / wall_s["hotset"],
            }
            for name, of in runs.items()
        },
    )
    print(json.dumps(result, indent=1))
    record.write(args.out, result, make_page(result))


def make_page(result: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {way['tokens_per_s_median']:.1f} | {way['wall_s_median']:.2f} "
        f"({min(way['wall_s']):.2f} to {max(way['wall_s']):.2f}) | "
        f"{way['user_finished_s']['p50']:.2f} / {way['user_finished_s']['p99']:.2f} | "
        f"{way['times_slower_than_hotset']:.2f} | "
        f"{min(way['users_with_tokens_of_generate'])} of {result['users']} |"
        for name, way in result["ways"].items()
    )
    return f"""# The engine on the CPU, against transformers

{result["users"]} users at once, {result["model"]}, {result["dtype"]}, greedy, prompts of
{min(result["prompt_tokens"])} to {max(result["prompt_tokens"])} tokens,
{result["output_tokens_per_user"]} output tokens each; {result["repeats"]} repeats, rotating.

| way | tokens/s | s (least to most) | user done p50 / p99, s | hotset faster by | same tokens |
|---|---|---|---|---|---|
{rows}

Medians over the repeats; `user done` is from the start until a user has the last token.

{record.footer(result)}"""


if __name__ == "__main__":
    main()
