"""Of the tokens that a model with a state need not compute, the share that it does not compute.

Conversations of several turns run side by side over a tiny Qwen3.5. Some share a system message,
and each turn is half reasoning, half answer. A token of a prompt is *attainable* where the prompt
begins as any of an earlier turn with its output did, up to and with that token. The share of these
that was found is counted for two templates:

- `drops`: leaves the reasoning out of earlier turns, so that the end of a turn is never repeated.
- `keeps`: writes the whole output of earlier turns, as plain chat templates do.

and for three places of states: the `device` alone, `tiers` under a device that holds the states of
a few requests, and a `restart` before each turn, so that all comes from disk. Without the places
that the server names (`named` is no), states are kept where prompts and requests end, and where a
second request saw known KV without a state.

    python benchmarks/hybrid_hits.py --out benchmarks/results/hybrid_hits_cpu

writes `.json` and `.md`.
"""

import argparse
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.run import run_to_end, settle
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.text.prompt import PromptEncoder

WORDS = ["the", "a", "cat", "dog", "house", "door", "by", "on", "under", "runs", "sleeps", "sees"]
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>", "<system>", "<think>", "</think>"]
HEAD = "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}<{{ m.role }}>"
TAIL = "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
REASONING = "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}"
TEMPLATES = {"drops": HEAD + TAIL, "keeps": HEAD + REASONING + TAIL}
MAX_LEN = 4096
TRANSFERS_S = 60.0


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=template
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        layer_types=kinds,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        max_position_embeddings=MAX_LEN,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return LoadedModel(model, tokenizer, "tiny", "tiny", (), MAX_LEN)


@dataclass
class Chats:
    """Conversations, and all token ids that the engine has seen."""

    rng: random.Random
    messages: list[list[dict[str, str]]]
    seen: list[np.ndarray] = field(default_factory=list)

    def text(self, low: int, high: int) -> str:
        """Random words."""
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(low, high)))

    def attainable(self, prompt: list[int]) -> int:
        """Leading tokens that some earlier prompt or its output began with."""
        ids, longest = np.array(prompt), 0
        for other in self.seen:
            size = min(len(ids), len(other))
            differ = np.flatnonzero(ids[:size] != other[:size])
            longest = max(longest, int(differ[0]) if len(differ) else size)
        return min(longest, len(prompt) - 1)


def make_chats(seed: int, users: int, systems: int) -> Chats:
    chats = Chats(random.Random(seed), [])
    texts = [chats.text(300, 800) for _ in range(systems)]
    for user in range(users):
        chats.messages.append([{"role": "system", "content": texts[user % systems]}])
    return chats


def run_turn(
    engine: Engine, encoder: PromptEncoder, chats: Chats, num_output: int, *, named: bool
) -> dict[str, int]:
    """A turn of each conversation, all at once."""
    prompts, attainable = {}, {}
    params = SamplingParams(max_tokens=num_output, ignore_eos=True)
    counts = {"prompt": 0, "attainable": 0, "found": 0}
    for number, messages in enumerate(chats.messages):
        messages.append({"role": "user", "content": chats.text(100, 400)})
        prompt = encoder.encode_chat(messages)
        places = prompt.repeated if named else ()
        request_id = engine.add_request(list(prompt), params, snapshot_at=places)
        prompts[request_id] = number, prompt
        attainable[request_id] = chats.attainable(prompt)
        counts["prompt"] += len(prompt)
    counts["attainable"] = sum(attainable.values())
    outputs: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    for output in run_to_end(engine):
        assert output.error is None, output.error
        outputs[output.request_id] += output.token_ids
        if output.finish_reason is not None:  # some find what others of this turn had computed
            counts["found"] += min(output.cached_tokens, attainable[output.request_id])
    for request_id, (number, prompt) in prompts.items():
        ids = outputs[request_id]
        chats.seen.append(np.array([*prompt, *ids[:-1]]))
        half = len(ids) // 2
        reasoning, answer = encoder.decode(ids[:half]), encoder.decode(ids[half:])
        message = {"role": "assistant", "content": answer, "reasoning_content": reasoning}
        chats.messages[number].append(message)
    return counts


def run_case(args: argparse.Namespace, template: str, place: str, named: bool) -> dict[str, Any]:
    tokenizer = make_tokenizer(TEMPLATES[template])
    loaded = make_model(tokenizer)
    encoder = PromptEncoder(loaded, finds_repeats=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"max_num_seqs": 4, "hot_gib": 0.008 if place != "device" else 0.3}
        if place != "device":
            sizes |= {"host_gib": 0.2, "disk_gib": 0.5, "disk_path": Path(folder)}
        engine = build_engine(Options.of(**sizes, threads=1), loaded)
        chats = make_chats(args.seed, args.users, args.systems)
        turns, hits = [], Counter[str]()
        for turn in range(args.turns):
            if place == "restart" and turn:
                engine.close()
                engine = build_engine(Options.of(**sizes, threads=1), loaded)
            turns.append(run_turn(engine, encoder, chats, args.output_tokens, named=named))
            settle(engine, TRANSFERS_S)  # a restart finds what was written
            assert not engine.has_transfers
            hits += engine.metrics.state_hits
            engine.metrics.state_hits.clear()
        row = {
            "template": template,
            "states": place,
            "named": "yes" if named else "no",
            **{name: sum(turn[name] for turn in turns) for name in turns[0]},
            "share": sum(t["found"] for t in turns) / sum(t["attainable"] for t in turns),
            **{f"from {tier}": hits[tier] for tier in ("device", "host", "disk")},
        }
        engine.close()
    print(record.table([row]), flush=True)
    return row


def main() -> None:
    parser = record.arguments(__doc__, out="path of the results, without suffix")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--systems", type=int, default=3, help="system messages that they share")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--output-tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases = [
        (template, place, named)
        for template in TEMPLATES
        for place in ("device", "tiers", "restart")
        for named in (True, False)
    ]
    rows = [run_case(args, *case) for case in cases]
    result = record.start(seed=args.seed, rows=rows)
    page = "\n".join(
        [
            "# Prefix hits of a model with a state beside KV",
            "",
            f"A tiny Qwen3.5 in float32. {args.users} conversations of {args.turns} turns share "
            f"{args.systems} system messages; a turn has 100 to 400 words and",
            f"{args.output_tokens} tokens of output, half of them reasoning. A token is "
            "*attainable* where its prompt begins as one of an",
            "earlier turn with its output did; *share* is the part of these that was found. "
            "*named*: the server names where prompts are likely",
            "to be repeated. States that were staged from disk ahead of their turn are counted as "
            "from host memory.",
            "",
            record.table(rows),
            "",
            record.footer(result),
        ]
    )
    print(page)
    record.write(args.out, result, page)


if __name__ == "__main__":
    main()
