"""Whether a number at the start of a long text is recalled from a state in each tier.

The texts begin with a pass key, go on with sentences that say nothing, and end with the question.
All are answered greedily, one at a time: computed; from states on the device; in host memory; and,
after a restart, on disk. *Recalled* is how many answers have the key, *equal* how many have the
tokens that were computed first.

    python benchmarks/hybrid_needle.py --model FOLDER --out benchmarks/results/hybrid_needle.json
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import record
from transformers import AutoTokenizer

from hotset.engine.engine import Engine
from hotset.engine.load import load_engine
from hotset.engine.run import run_to_end, settle
from hotset.options import Options
from hotset.request import SamplingParams

SEED, TRANSFERS_S, ANSWER = 0, 120.0, 12
HEAD = "The pass key is {}. Remember it, as you will be asked for it at the end of this text.\n"
FILLER = "The grass is green, the sky is blue, and the road goes on behind the next hill. "
TAIL = "\nWhat was the pass key at the start of this text? The pass key is"


def make_texts(tokenizer: Any, num: int, num_tokens: int) -> tuple[list[str], list[list[int]]]:
    """Keys, and the tokens of their texts: all of one length, as the keys are."""
    rng = random.Random(SEED)
    keys = [str(rng.randrange(10_000, 100_000)) for _ in range(num)]
    repeats = num_tokens // len(tokenizer.encode(FILLER, add_special_tokens=False))
    return keys, [tokenizer.encode(HEAD.format(key) + FILLER * repeats + TAIL) for key in keys]


def answers(engine: Engine, texts: list[list[int]]) -> tuple[list[list[int]], int]:
    """The answer to each text, one after another, and how many tokens were found."""
    params, found, made = SamplingParams(max_tokens=ANSWER, ignore_eos=True), 0, []
    for text in texts:
        tokens: list[int] = []
        engine.add_request(text, params)
        for output in run_to_end(engine):
            assert output.error is None, output.error
            tokens += output.token_ids
            found += output.cached_tokens if output.finish_reason is not None else 0
        settle(engine, TRANSFERS_S)
        made.append(tokens)
    return made, found


def forget_device(engine: Engine) -> None:
    """What was kept is in slower tiers alone."""
    assert engine.kv.states is not None, "the model keeps no state"
    engine.kv.pool.forget_cached()
    engine.kv.states.slots.pool.forget_cached()


def places(options: Options, texts: list[list[int]]) -> Iterator[tuple[str, Any, int]]:
    """What is answered from each place."""
    engine, _ = load_engine(options)
    yield "computed", *answers(engine, texts)
    yield "device", *answers(engine, texts)
    forget_device(engine)
    yield "host", *answers(engine, texts)
    engine.close()
    engine, _ = load_engine(options)
    yield "disk", *answers(engine, texts)
    engine.close()


def main() -> None:
    """Run what the command line asks for."""
    parser = record.arguments(__doc__)
    parser.add_argument("--model", required=True, help="a folder with weights")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--hot-gib", type=float, default=16.0)
    parser.add_argument("--host-gib", type=float, default=16.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = Options.of(
            model=arguments.model,
            device=arguments.device,
            hot_gib=arguments.hot_gib,
            host_gib=arguments.host_gib,
            disk_gib=arguments.host_gib,
            disk_path=Path(folder),
            fetch_policy="fetch",
            max_num_seqs=arguments.texts,
        )
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        keys, texts = make_texts(tokenizer, arguments.texts, arguments.tokens)
        rows, computed = [], []
        for place, made, found in places(options, texts):
            computed = computed or made
            said = [tokenizer.decode(tokens) for tokens in made]
            row = {
                "place": place,
                "tokens": sum(map(len, texts)),
                "found": found,
                "recalled": sum(key in text for key, text in zip(keys, said, strict=True)),
                "equal": sum(one == other for one, other in zip(made, computed, strict=True)),
            }
            rows.append(row)
            record.say(record.table([row]))
    record.write(arguments.out, record.start(model=arguments.model, seed=SEED, rows=rows))


if __name__ == "__main__":
    main()
