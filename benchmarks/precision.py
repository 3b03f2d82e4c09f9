"""What 8-bit weights and 8-bit keys and values change: logits and greedy tokens, default model.

Each variant reads the same texts, 512 tokens at a time, and answers the same questions; compared
with float32 weights and KV. Texts are this repository's documents and the questions are chats.

    python benchmarks/precision.py --out benchmarks/results/precision_cpu

writes `.json` and `.md`.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import record
import torch
from cpu_engine import QUESTIONS

from hotset.attention.inputs import copy_batch
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.run import run_to_end
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.model import default_model
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.sequence import Request
from hotset.text.prompt import PromptEncoder
from hotset.units import GIB

VARIANTS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float32, KV fp8": {"dtype": "float32", "kv_dtype": "fp8"},
    "bfloat16, KV fp8": {"dtype": "bfloat16", "kv_dtype": "fp8"},
    "fp8": {"dtype": "fp8"},
    "fp8, KV fp8": {"dtype": "fp8", "kv_dtype": "fp8"},
}
TEXTS = ("architecture.md", "planner.md", "server.md")
CHUNK = 512
NUM_OUTPUT = 64
ROOT = Path(__file__).resolve().parent.parent


def read_logits(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """`[T, vocab]` float32 logits of one prefill."""
    runner = engine.executor.runner
    request = Request("r", len(token_ids), token_ids, SamplingParams(), len(token_ids))
    request.kv.block_table = list(range(-(-len(token_ids) // engine.sizes.block_size)))
    batch = make_step_input(
        Step([StepItem.of(request, 0, len(token_ids))]), engine.sizes.block_size
    ).batch
    inputs, _ = copy_batch(batch, engine.executor.runner.device)
    with torch.inference_mode():
        attention = runner._attention.begin_step(batch, inputs)
        return runner._logits(inputs.token_ids, inputs.positions, attention, None).float().cpu()


def answer(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, all prompts at once."""
    params = SamplingParams(max_tokens=NUM_OUTPUT, ignore_eos=True)
    answers: dict[str, list[int]] = {engine.add_request(p, params): [] for p in prompts}
    for output in run_to_end(engine):
        answers[output.request_id] += output.token_ids
    return list(answers.values())


def run(options: dict[str, Any], device: str) -> dict[str, Any]:
    config = Options.of(device=device, hot_gib=0.5, max_model_len=1024, eager=True, **options)
    # The folder, whose weights are in bfloat16: a CPU keeps the GGUF file narrow in any dtype.
    loaded = load_model(str(default_model.ensure()), device=device, dtype=options["dtype"])
    encoder = PromptEncoder(loaded)
    ids = [t for name in TEXTS for t in encoder.encode_text((ROOT / "docs" / name).read_text())]
    chunks = [ids[i : i + CHUNK] for i in range(0, len(ids) - CHUNK, CHUNK)]
    prompts = [encoder.encode_chat([{"role": "user", "content": q}]) for q in QUESTIONS]
    engine = build_engine(config, loaded)
    try:
        return {
            "logits": [read_logits(engine, chunk) for chunk in chunks],
            "chunks": chunks,
            "answers": answer(engine, prompts),
            "weights_gib": engine.sizes.weights_bytes / GIB,
            "kv_bytes_per_token": engine.sizes.block_bytes // engine.sizes.block_size,
        }
    finally:
        engine.close()


def compare(base: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Over all tokens of all texts, and over all answers."""
    nll, kl, same, error, size = 0.0, 0.0, 0, 0.0, 0.0
    num_tokens = sum(len(chunk) - 1 for chunk in base["chunks"])
    for chunk, one, two in zip(base["chunks"], base["logits"], other["logits"], strict=True):
        one, two = one[:-1], two[:-1]
        p, q = one.log_softmax(-1), two.log_softmax(-1)
        nll -= float(q.gather(1, torch.tensor(chunk[1:])[:, None]).sum())
        kl += float((p.exp() * (p - q)).sum())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
        centred = one - one.mean(-1, keepdim=True)
        error += float((two - two.mean(-1, keepdim=True) - centred).square().sum())
        size += float(centred.square().sum())
    leading = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(base["answers"], other["answers"], strict=True)
    ]
    return {
        "perplexity": math.exp(nll / num_tokens),
        "kl_nats": kl / num_tokens,
        "same_top_token": same / num_tokens,
        "logit_error": math.sqrt(error / size),
        "same_answers": sum(n == NUM_OUTPUT for n in leading) / len(leading),
        "leading_tokens_mean": sum(leading) / len(leading),
        "weights_gib": other["weights_gib"],
        "kv_bytes_per_token": other["kv_bytes_per_token"],
        "num_tokens": num_tokens,
    }


def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    base = run(VARIANTS["float32"], args.device)
    rows = {}
    for name, options in VARIANTS.items():
        rows[name] = compare(base, base if name == "float32" else run(options, args.device))
        print(name, json.dumps(rows[name]), file=sys.stderr)
    result = record.start(
        model="smollm2-135m-instruct",
        device=args.device,
        questions=len(QUESTIONS),
        output_tokens=NUM_OUTPUT,
        rows=rows,
    )
    print(json.dumps(result, indent=1))
    record.write(args.out, result, make_page(result))


def make_page(result: dict[str, Any]) -> str:
    lines = "\n".join(
        f"| {name} | {row['weights_gib']:.3f} | {row['kv_bytes_per_token']} | "
        f"{row['perplexity']:.3f} | {row['kl_nats']:.5f} | {row['logit_error']:.1%} | "
        f"{row['same_top_token']:.1%} | {row['same_answers']:.0%} | "
        f"{row['leading_tokens_mean']:.0f} |"
        for name, row in result["rows"].items()
    )
    num_tokens = result["rows"]["float32"]["num_tokens"]
    return f"""# What 8-bit weights and KV change

{result["model"]} on {result["device"]}, against float32, over {num_tokens} tokens of documents, and
{result["questions"]} chats answered greedily with {result["output_tokens"]} tokens each.

| weights, KV | weights GiB | KV bytes a token | perplexity | KL, nats | logit error | \
same top token | same answers | leading tokens that agree |
|---|---|---|---|---|---|---|---|---|
{lines}

`KL` is the mean divergence of the next token's distribution; the logit error is relative to the
spread of the logits; `leading tokens` is how far an answer agrees, on average.

{record.footer(result)}"""


if __name__ == "__main__":
    main()
