"""Engines over tiny models, and what transformers says they should answer."""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from rounded_scores import round_index_keys
from tied_scores import select_lowest_of_ties
from tiny_models import make_model
from transformers import PreTrainedModel

from hotset.cost.cache_spec import state_slot_bytes
from hotset.cost.expert_sizes import asked_sizes, size_experts
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.executor.probe import inspect_model
from hotset.executor.simulated import Simulated
from hotset.expert_options import ExpertBudget, ExpertSlots, HostedExperts
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.disk import DiskExperts
from hotset.experts.hosting import buffer_experts, make_buffer
from hotset.experts.prefetch import Router
from hotset.experts.sizes import sizes_of, slot_bytes_of, why_not_hosted
from hotset.experts.weights import LayerExperts, experts_layers
from hotset.linear.fp8 import FP8
from hotset.memory.region import SharedRegion
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.units import GIB


def make_engine(
    family: str = "llama",
    *,
    hot_blocks: int = 200,
    host_blocks: int = 0,
    disk_mib: float = 0.0,
    block_size: int = 4,
    seed: int = 0,
    overlap: bool | None = None,
    kv_bytes: int = 4,
    model_dtype: torch.dtype | None = None,
    model_changes: dict[str, Any] | None = None,
    simulated: Simulated | None = None,
    **changes: Any,
) -> Engine:
    """An engine over a tiny model, its tiers sized in blocks of values of `kv_bytes` bytes.

    One whose layers keep a state has memory for those of 8 requests beside.

    `model_changes` are of its config; a `model_dtype` of None is its own. All its experts stay on
    the device, unless `changes` say how many. The caller closes it.
    """
    model = make_model(family, seed=seed, **model_changes or {})
    model = model.to(changes.get("device", "cpu"), model_dtype or model.dtype)
    options = sizes_in_blocks(
        model,
        hot_blocks=hot_blocks,
        host_blocks=host_blocks,
        disk_mib=disk_mib,
        block_size=block_size,
        kv_bytes=kv_bytes,
        **changes,
    )
    loaded = LoadedModel(model, None, family, f"{family}-{seed}", (2,), 512)
    engine = build_engine(Options.of(**options), loaded, overlap=overlap, simulated=simulated)
    assert engine.sizes.states is not None or engine.sizes.device_blocks == hot_blocks
    return engine


def sizes_in_blocks(
    model: PreTrainedModel,
    *,
    hot_blocks: int = 200,
    host_blocks: int = 0,
    disk_mib: float = 0.0,
    block_size: int = 4,
    kv_bytes: int = 4,
    num_ranks: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """Options that give each rank this number of blocks; see `make_engine`."""
    if slot_bytes_of(model, HostedExperts()) is not None and "expert_gib" not in changes:
        changes.setdefault("expert_slots", experts_layers(model)[0].num_experts)
    layout = inspect_model(model, index_dtype=FP8 if changes.get("index_dtype") == "fp8" else None)
    token_bytes = layout.bytes_per_token
    if kv_bytes != layout.kv_dtype.itemsize:
        token_bytes = token_bytes // layout.kv_dtype.itemsize * kv_bytes
    block_bytes = token_bytes * block_size
    slot_bytes = -(-block_bytes // 4096) * 4096 * num_ranks
    num_slots = 10 if layout.states else 0  # with two that are reserved
    states_bytes = num_slots * state_slot_bytes(layout.states.values())
    return {
        "hot_gib": ((hot_blocks + 0.5) * block_bytes + states_bytes) / GIB,
        "host_gib": (host_blocks + 0.5) * slot_bytes / GIB if host_blocks else 0.0,
        "disk_gib": disk_mib / 1024,
        "block_size": block_size,
        "max_model_len": 96,
        **changes,
    }


def give_slots(
    model: Any, options: Options, region: SharedRegion | None = None
) -> tuple[ExpertBuffer | None, str]:
    """Buffer the experts of a model as an engine with these options would."""
    asked, sizes = options.experts, None
    if isinstance(asked, HostedExperts):
        slots, why_not = slot_bytes_of(model, asked), why_not_hosted(model)
        sizes = size_experts(asked, slots, why_not, device=model.device.type)
    return buffer_experts(model, asked, sizes, region=region, read_deadline_s=60.0)


def make_slots(
    experts: list[LayerExperts],
    options: Options,
    device: torch.device,
    routers: list[Router] | None = None,
    region: SharedRegion | None = None,
) -> ExpertBuffer:
    """Slots for layers whose experts are in host memory or on disk."""
    asked = options.experts
    assert isinstance(asked, ExpertSlots | ExpertBudget)
    sizes = asked_sizes(asked, sizes_of(experts, asked, device), device=device.type)
    slots = sizes.slots
    if any(each.hosted and isinstance(each.hosted.source, DiskExperts) for each in experts):
        slots = replace(slots, plan="cache")
    if region is not None:
        slots = replace(slots, fewest_ever=region.fewest_slots)
    return make_buffer(experts, asked, replace(sizes, slots=slots), device, routers, region)


def run(
    engine: Engine,
    prompts: list[list[int]],
    *,
    max_tokens: int = 12,
    each_step: Callable[[], None] = lambda: None,
    **params: Any,
) -> list[list[int]]:
    """Run all prompts at once to their end; the output tokens of each."""
    ids = [
        engine.add_request(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params))
        for prompt in prompts
    ]
    outputs: dict[str, list[int]] = {request_id: [] for request_id in ids}
    for _ in range(100_000):
        if not engine.has_work:
            break
        for output in engine.step():
            assert output.error is None, output.error
            outputs[output.request_id] += output.token_ids
        each_step()
        for lane in engine.lanes:
            lane.kv.check()
    assert not engine.has_work, "the engine did not finish"
    return list(outputs.values())


def logits_of(
    engine: Engine, prompts: list[list[int]], *, max_tokens: int, turn: bool
) -> list[torch.Tensor]:
    """Logits of each step; with `turn` requests are made hot as soon as they can be."""
    found, forward = [], engine.executor.runner.forward

    def note(*args: Any) -> torch.Tensor:
        found.append(forward(*args).clone())
        return found[-1]

    def turn_all() -> None:
        for request in engine.scheduler.running if turn else ():
            assert engine.kv.hot is not None
            engine.kv.hot.turn_hot(request)

    engine.executor.runner.forward = note
    run(engine, prompts, max_tokens=max_tokens, each_step=turn_all)
    return found


def reference(
    family: str,
    prompts: list[list[int]],
    *,
    max_tokens: int = 12,
    seed: int = 0,
    device: str = "cpu",
    ties: Literal["lowest", "any"] = "lowest",
    index_dtype: Literal["auto", "fp8"] = "auto",
    **changes: Any,
) -> list[list[int]]:
    """What `transformers` `generate` answers, greedily, prompt by prompt; of a changed model.

    `ties` says which of equal scores sparse attention selects: see `tied_scores`; `index_dtype`
    what keys it scores: see `rounded_scores`.
    """
    asked = json.dumps((family, prompts, max_tokens, seed, device, ties, index_dtype, changes))
    return [list(tokens) for tokens in _reference(asked)]


@functools.cache
def _reference(asked: str) -> list[list[int]]:
    """The same, of arguments as JSON: modules ask for one thing many times."""
    family, prompts, max_tokens, seed, device, ties, index_dtype, changes = json.loads(asked)
    model = make_model(family, seed=seed, **changes).to(device)
    if ties == "lowest":
        select_lowest_of_ties(model)
    if index_dtype == "fp8":
        round_index_keys(model)
    # The only one of its implementations that knows all that architectures ask of attention.
    model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt], device=device),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def make_prompts(seed: int = 0, num: int = 6) -> list[list[int]]:
    """Prompts of 3 to 60 tokens, half of them with a common start."""
    rng = random.Random(seed)
    common = [rng.randrange(3, 256) for _ in range(22)]
    prompts = []
    for i in range(num):
        own = [rng.randrange(3, 256) for _ in range(rng.randint(3, 38))]
        prompts.append(common + own if i % 2 else own)
    return prompts
