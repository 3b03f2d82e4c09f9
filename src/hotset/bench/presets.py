"""Workloads by name, with the model and the sizes of a published comparison: a row of data each."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hotset.bench.workload import Spec

# What the workloads are where nothing else is asked for: for the small default model on a CPU.
DEFAULTS = {
    "unshared": Spec("unshared", users=16, first_tokens=128, output_tokens=32),
    "pressure": Spec("pressure", users=16, first_tokens=384, output_tokens=64),
    "multiturn": Spec("multiturn", users=16, turns=4, first_tokens=320, output_tokens=16),
    "shared-prefix": Spec("shared-prefix", users=16, first_tokens=64, prefix_tokens=768),
    "documents": Spec("documents", users=24, turns=4, first_tokens=640, output_tokens=40),
    "questions": Spec("questions", users=4, output_tokens=48),
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A workload with the model and the sizes of a published comparison.

    Attributes:
        model: a bundled shape, or the config file of one, for dummy weights; None is the default
            model.
        engine: fields of `Options` other than the tiers' sizes.
        arms: what runs where no arms are named and experts are not bounded.
        run: fields of `RunOptions`.
    """

    spec: Spec
    about: str
    model: str | None = None
    hot_gib: float | None = None
    host_gib: float = 0.0
    disk_gib: float = 0.0
    engine: dict[str, Any] = field(default_factory=dict)
    arms: tuple[str, ...] = ("hot", "host")
    run: dict[str, Any] = field(default_factory=dict)


_PEERS: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "host_gib": 64.0,
    "disk_gib": 40.0,
    "engine": {"max_num_batched_tokens": 8192, "max_model_len": 8192, "max_num_seqs": 256},
}
# Sampled: greedy answers of random weights repeat few tokens, and so use few experts.
_PEERS_MOE: dict[str, Any] = {
    "model": "qwen3-30b-a3b",
    "hot_gib": 20.0,
    "engine": {"max_num_batched_tokens": 8192, "max_model_len": 8192, "max_num_seqs": 256},
    "arms": ("resident",),
}

# In float32, so that the arms can be compared token by token.
_DEMO: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_num_batched_tokens": 512}


_SHAPES = Path(__file__).with_name("shapes")
# Prompts are put in place: a step takes many of their tokens at once.
_PLACED: dict[str, Any] = {
    "max_num_batched_tokens": 8192,
    "max_mixed_tokens": 8192,
    "prefix_caching": False,
}


def _moe(users: int, first_tokens: int, output_tokens: int, seed: int) -> Spec:
    return Spec(
        "unshared",
        users=users,
        first_tokens=first_tokens,
        output_tokens=output_tokens,
        temperature=1.0,
        seed=seed,
    )


_C6 = Spec("multiturn", 256, 6, first_tokens=896, new_tokens=128, output_tokens=64, seed=1004)

# Prompts are uniform random ids of `random.Random(1000 + index)`, in this order.
PRESETS = {
    "A512": Preset(
        Spec("unshared", users=256, first_tokens=512, output_tokens=256, seed=1000),
        "256 requests of 512 / 256 tokens at once, everything resident",
        **_PEERS,
    ),
    "A4096": Preset(
        Spec("unshared", users=256, first_tokens=4096, output_tokens=512, seed=1001),
        "256 requests of 4096 / 512 tokens at once, all free device memory for KV",
        **_PEERS,
    ),
    "B": Preset(
        Spec("pressure", users=256, first_tokens=4096, output_tokens=512, seed=1002),
        "256 requests of 4096 / 512 tokens at once, 16 GiB of KV, nothing shared",
        hot_gib=16.0,
        **_PEERS,
    ),
    "C3": Preset(
        Spec("multiturn", 256, 3, first_tokens=1280, new_tokens=256, output_tokens=64, seed=1003),
        "256 users, 3 turns, 16 GiB of KV",
        hot_gib=16.0,
        **_PEERS,
    ),
    "C6": Preset(
        _C6,
        "256 users, 6 turns, 16 GiB of KV",
        hot_gib=16.0,
        **_PEERS,
    ),
    "H6": Preset(
        replace(_C6, temperature=1.0),
        "C6 of a hybrid: 256 users, 6 turns, 16 GiB of KV and state, all experts resident",
        model="qwen3.5-35b-a3b",
        hot_gib=16.0,
        host_gib=64.0,
        engine={**_PEERS["engine"], "expert_slots": 256},
    ),
    "D256": Preset(
        _moe(256, 512, 256, 1005),
        "256 requests of 512 / 256 tokens at once to a Mixture of Experts, 20 GiB of KV",
        **_PEERS_MOE,
    ),
    "D256-64": Preset(_moe(256, 512, 64, 1006), "D256 with answers of 64 tokens", **_PEERS_MOE),
    "D256-32": Preset(_moe(256, 512, 32, 1007), "D256 with answers of 32 tokens", **_PEERS_MOE),
    "D16": Preset(_moe(16, 512, 256, 1008), "16 requests of 512 / 256 tokens", **_PEERS_MOE),
    "D1": Preset(_moe(1, 64, 16, 1009), "one request of 64 / 16 tokens", **_PEERS_MOE),
    "D8": Preset(_moe(8, 96, 3, 1010), "8 requests of 96 / 3 tokens", **_PEERS_MOE),
    "S": Preset(
        Spec("unshared", 256, 1, first_tokens=32768, output_tokens=2048, temperature=1.0),
        "256 users with 32768 tokens each decode by sparse attention, 6 GiB of KV",
        model=str(_SHAPES / "dsa-8l.json"),
        hot_gib=6.0,
        host_gib=64.0,
        run={"steady_steps": 200, "selection_overlap": 0.4},
        engine={
            **_PLACED,
            "index_dtype": "fp8",
            "max_num_seqs": 128,
            "max_model_len": 35840,
            "hot_tokens": 4096,
        },
        arms=("resident", "hot-set"),
    ),
    "S-small": Preset(
        Spec("unshared", 16, 1, first_tokens=512, output_tokens=160),
        "S in small, for a small model with sparse attention on a CPU",
        model=str(_SHAPES / "dsa-small.json"),
        hot_gib=0.008,
        host_gib=0.05,
        run={"steady_steps": 60, "selection_overlap": 0.4},
        engine={
            **_PLACED,
            "device": "cpu",
            "block_size": 16,
            "max_model_len": 704,
            "hot_tokens": 96,
        },
        arms=("resident", "hot-set"),
    ),
    "A-small": Preset(
        Spec("unshared", users=16, first_tokens=64, output_tokens=32, seed=1000),
        "A512 in small, for the default model on a CPU",
    ),
    "B-small": Preset(
        Spec("pressure", users=16, first_tokens=512, output_tokens=64, seed=1002),
        "B in small, for the default model on a CPU",
    ),
    "C3-small": Preset(
        Spec("multiturn", 16, 3, first_tokens=320, new_tokens=64, output_tokens=16, seed=1003),
        "C3 in small, for the default model on a CPU",
    ),
    "C6-small": Preset(
        Spec("multiturn", 16, 6, first_tokens=224, new_tokens=32, output_tokens=16, seed=1004),
        "C6 in small, for the default model on a CPU",
    ),
    "D-small": Preset(
        _moe(16, 64, 32, 1008),
        "D16 in small, for a small Mixture of Experts on a CPU",
        model=str(_SHAPES / "qwen3-moe-small.json"),
        hot_gib=0.1,
        engine={"device": "cpu"},
        arms=("resident",),
    ),
    "demo": Preset(
        DEFAULTS["documents"],
        "24 users ask about texts of Python's documentation, 4 turns: `hotset demo`",
        engine=_DEMO,
        arms=("hot", "host+disk"),
    ),
    "demo-moe": Preset(
        DEFAULTS["questions"],
        "4 users ask a small Mixture of Experts, with a quarter of its experts: `hotset demo-moe`",
        engine={
            **_DEMO,
            **{"model": "smollm2-135m-upcycled", "expert_slots": 2, "expert_plan": "cache"},
            "prefix_caching": False,
        },
        arms=("resident", "experts"),
    ),
}
