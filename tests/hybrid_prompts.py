"""What tests of kept states run and note."""

import random
from typing import Any

import torch

from hotset.engine.engine import Engine

# One of each kind of state: short convolutions alone, gated delta rule, Mamba-2, Mamba-1.
KINDS = ["lfm2", "qwen3_5_text", "bamba", "jamba"]
ROOM = {"max_model_len": 400, "hot_blocks": 600, "max_num_seqs": 4}
TOKENS = 12


def make_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(3, 256) for _ in range(num_tokens)]


def note_logits(engine: Engine) -> list[torch.Tensor]:
    """The logits of each step from now on."""
    noted: list[torch.Tensor] = []
    runner: Any = engine.executor.runner  # type: ignore[attr-defined]
    forward = runner.forward

    def noting(*args: Any, **options: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(*args, **options)
        if len(logits):
            noted.append(logits.clone())
        return logits

    runner.forward = noting
    return noted


def found(engine: Engine) -> int:
    """Tokens that were found and not computed."""
    return int(engine.metrics.cached_tokens.total())
