"""The planner's view of a loaded model: sizes of its own layers, so that any family has them."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.attention.sparse.check import share_kept
from hotset.attention.spec import LayerAttention
from hotset.cost.attention import Attention, Kind
from hotset.cost.cache_spec import Latent, NoCache, State, state_slot_bytes
from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.config_sizes import largest
from hotset.cost.expert_steps import ExpertCost, link_of
from hotset.cost.hardware import Hardware
from hotset.cost.hot_set import Room, SparseCache
from hotset.cost.params import Params, name_of
from hotset.cost.routing import Routing
from hotset.cost.shape import Layer, ModelShape
from hotset.cost.slot_bytes import SlotBytes
from hotset.cost.step_time import CostModel
from hotset.cost.tuning import TUNINGS
from hotset.engine.hot_sizing import HotChoice, SparseSizes
from hotset.engine.memory_split import Rated
from hotset.engine.model_sizes import ModelSizes
from hotset.engine.sizing import Sizes
from hotset.errors import ConfigError
from hotset.executor.probe import ModelLayout, weights_bytes, workspace_bytes
from hotset.expert_options import HostedExperts, SplitMemory
from hotset.experts.sizes import slot_bytes_of, why_not_hosted
from hotset.experts.weights import experts_bytes, experts_layers
from hotset.kernels.device import gpu_name, known_hardware, likely_hardware
from hotset.layout import Layout
from hotset.linear.packed import PackedLinear
from hotset.model.loaded import LoadedModel
from hotset.options import Options
from hotset.parallel.group import current

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def measure_model(loaded: LoadedModel, layout: ModelLayout, options: Options) -> ModelSizes:
    """What sizes follow from, of a model that is loaded on its device.

    Raises:
        ConfigError: its experts are in host memory in other bits than asked for; or a device that
            is not supported.
    """
    model, asked = loaded.model, options.experts
    device, layers = model.device, experts_layers(model)
    why_not_hot = layout.why_not_hot
    if why_not_hot is None and current().size > 1:
        why_not_hot = "its rows are on several GPUs"
    if device.type not in TUNINGS:
        raise ConfigError(f"device {device.type!r} is not supported; expected cpu or cuda")
    slots = slot_bytes_of(model, asked) if isinstance(asked, HostedExperts) else None
    rated = None
    if slots is not None and isinstance(asked, SplitMemory):
        name = gpu_name(device) or "this CPU"
        rated = Rated(
            functools.partial(_expert_cost, loaded, layout),
            is_known=known_hardware(device) is not None,
            device_name=name,
        )
    return ModelSizes(
        device=device.type,
        max_len=loaded.max_model_len,
        kv_bytes_per_token=layout.bytes_per_token,
        block_size=options.memory.block_size or layout.default_block_size,
        workspace_bytes=workspace_bytes(
            model,
            layout,
            max_tokens=options.schedule.max_num_batched_tokens,
            max_seqs=options.schedule.max_num_seqs,
        ),
        dense_bytes=weights_bytes(model) - experts_bytes(model),
        expert_bytes=experts_bytes(model),
        device_expert_bytes=experts_bytes(model, device),
        num_experts=layers[0].num_experts if layers else 0,
        top_k=largest(model.config.get_text_config(), "num_experts_per_tok") or 1,
        slots=slots,
        why_not_hosted=why_not_hosted(model),
        rated=rated,
        has_index_keys=any(layout.index_dims),
        state_bytes=state_slot_bytes(layout.states.values()),
        sparse=None if why_not_hot else _sparse_sizes(layout),
        why_not_hot=why_not_hot or "",
    )


def _sparse_sizes(layout: ModelLayout) -> SparseSizes:
    indexer = layout.layers[0].indexer
    assert indexer is not None
    return SparseSizes(
        selected=indexer.top_k,
        row_bytes=layout.row_bytes,
        index_bytes=layout.index_bytes,
        index_layers=sum(dim > 0 for dim in layout.index_dims),
    )


def _expert_cost(loaded: LoadedModel, layout: ModelLayout, slots: SlotBytes) -> ExpertCost:
    """Of this hardware, or of the nearest one where its rates are not known."""
    hardware = likely_hardware(loaded.model.device)
    cost = make_cost_model(loaded.model, layout, slots, loaded.name, hardware)
    return ExpertCost(cost, link_of(cost, cold_bytes=slots.cold_bytes), slots.plan)


def hot_choice(
    loaded: LoadedModel, layout: ModelLayout, sizes: Sizes, options: Options
) -> Callable[[int, float], int] | None:
    """When requests turn hot: see `HotChoice`. None: never, as their steps cannot be predicted.

    Args:
        loaded: the model.
        layout: what its layers cache; all select.
        sizes: of an engine over it, in which requests may be hot.
        options: the user's.

    Raises:
        ConfigError: a bound on steps that cannot be predicted.
    """
    hot, schedule = sizes.hot, options.schedule
    most = schedule.max_num_seqs
    assert hot is not None
    if hot.is_asked and schedule.tpot_ms is None:
        return lambda wanted, context: most
    slots = slot_bytes_of(loaded.model, HostedExperts())
    cost = cache = None
    if slots is not None:
        hardware = likely_hardware(loaded.model.device)
        cost = make_cost_model(loaded.model, layout, slots, loaded.name, hardware)
        cache = SparseCache.of(cost.shape, _dtype_name(layout.kv_dtype))
    if cost is None or cache is None:
        if schedule.tpot_ms is not None:
            raise ConfigError(
                f"tpot_ms is {schedule.tpot_ms}, but the steps of {loaded.name} cannot be "
                "predicted; leave tpot_ms out"
            )
        return None
    return HotChoice(
        cost,
        cache,
        Room(
            float(sizes.device_blocks * sizes.block_bytes),
            float(sizes.host_slots * sizes.block_bytes),
        ),
        num_slots=hot.num_slots,
        most=most,
        tpot_s=None if schedule.tpot_ms is None else schedule.tpot_ms / 1e3,
        must_pay=not hot.is_asked,
        prefetch=options.memory.row_prefetch,
    )


def make_cost_model(
    model: PreTrainedModel, layout: ModelLayout, slots: SlotBytes, name: str, hardware: Hardware
) -> CostModel:
    """The cost model of a loaded Mixture of Experts on one device.

    Args:
        model: its experts may be on the device or in host memory, packed or not.
        layout: what its layers cache.
        slots: of its experts.
        name: of the model, for messages.
        hardware: that it runs on.
    """
    shape = shape_of(model, layout, slots, name)
    kv_dtype = _dtype_name(layout.kv_dtype)
    return CostModel(shape, hardware, Layout(tp=1), kv_dtype, CALIBRATIONS["hotset"], Routing())


def kv_note(model: PreTrainedModel, layout: ModelLayout) -> str:
    """Where a token takes more KV than its model needs, and so than it is often said to: that line.

    That is so of latents where the model's way to make keys of them is not known, as the engine
    stores keys and values then; of heads that a model repeats before its attention; and of values
    that are narrower than keys. Index keys are no KV.
    """
    config = model.config.get_text_config()
    stored = layout.row_bytes // layout.kv_dtype.itemsize
    rank, rope = largest(config, "kv_lora_rank"), largest(config, "qk_rope_head_dim")
    if rank:
        needed, what = len(layout.layers) * (rank + rope), "the latent alone"
    else:
        widths = (a.cache.token_values for a in layout.layers)
        needed = sum(widths) // layout.head_repeats
        what = "its keys and values without repeated heads and padding"
    if stored <= needed:
        return ""
    size = layout.kv_dtype.itemsize
    return (
        f"KV of all heads is stored: {stored * size:,} B a token, {stored / needed:.2f} times the "
        f"{needed * size:,} B of {what}"
    )


def index_note(model: PreTrainedModel, layout: ModelLayout) -> str:
    """What 8-bit index keys change; empty where keys have the model's dtype."""
    if layout.index_dtype is None:
        return ""
    return (
        f"index keys in fp8: {layout.index_bytes:,} B per token; of random tokens they select "
        f"{share_kept(model):.1%} of those that keys in the model's dtype select"
    )


def shape_of(
    model: PreTrainedModel, layout: ModelLayout, slots: SlotBytes, name: str
) -> ModelShape:
    """The sizes of a loaded Mixture of Experts; see `make_cost_model`."""
    config = model.config.get_text_config()
    expert_modules = [experts.module for experts in experts_layers(model)]
    with_experts = _layers_with_experts(model)
    attention: dict[int | None, Params] = defaultdict(Params)
    others: dict[int | None, Params] = defaultdict(Params)
    for path, params in _dense_params(model, expert_modules):
        layer = _layer_of(path)
        part = attention if "attn" in path or "attention" in path else others
        part[layer] += params
    biases = (p for p in expert_modules[0].parameters(recurse=False) if p.ndim == 2)  # `[E, n]`
    narrow = experts_layers(model)[0].narrow
    is_narrow = narrow is not None and slots.payload_bytes == narrow.payload_bytes
    expert_bytes = (
        experts_layers(model)[0].layout.weight_bytes if is_narrow else slots.payload_bytes
    )
    expert = Params(expert_bytes // model.dtype.itemsize, sum(bias.shape[1] for bias in biases))
    is_fp8 = any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    quantised = dict.fromkeys(("attention", "mlp"), "fp8") if is_fp8 else {}
    if narrow is not None and is_narrow:
        quantised["expert"] = name_of(narrow.form)
    layers = []
    kv_layers = layout.kv_layers
    for index in range(config.num_hidden_layers):
        has_experts = index in with_experts
        attends = kv_layers.get(index)
        state = layout.states.get(index)
        layers.append(
            Layer(
                _attention(layout.layers[attends], attention[index])
                if attends is not None
                else _without_kv(state, attention[index]),
                Params() if has_experts else others[index],
                others[index] if has_experts else Params(),
                expert=expert if has_experts else Params(),
                num_experts=slots.num_experts if has_experts else 0,
                top_k_experts=layout.experts_per_token if has_experts else 0,
            )
        )
    vocab = Params(config.vocab_size * config.hidden_size)
    outside = attention[None].count + others[None].count
    has_head = outside >= 2 * vocab.count
    rest = max(0, outside - vocab.count * (1 + has_head))
    return ModelShape(
        name=name,
        model_type=config.model_type,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=tuple(layers),
        embedding=vocab,
        head=vocab if has_head else Params(),
        other=Params(rest),
        plain_dtype=_dtype_name(model.dtype),
        index_dtype="auto" if layout.index_dtype is None else _dtype_name(layout.index_dtype),
        quantised=quantised,
    )


def _layers_with_experts(model: PreTrainedModel) -> set[int]:
    """Indices of the layers that have experts."""
    expert_ids = {id(experts.module) for experts in experts_layers(model)}
    found = {_layer_of(f"{path}.") for path, m in model.named_modules() if id(m) in expert_ids}
    return {index for index in found if index is not None}


def _dense_params(
    model: PreTrainedModel, expert_modules: list[nn.Module]
) -> Iterator[tuple[str, Params]]:
    """Paths and counts of all parameters but the experts', each once."""
    left_out = {id(part) for layer in expert_modules for part in layer.modules()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in left_out:
            continue
        if isinstance(module, PackedLinear):
            yield f"{path}.", Params(module.num_bytes // model.dtype.itemsize)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count = math.prod(parameter.shape)
            if parameter.dtype == torch.uint8:  # bytes of a weight in few bits
                yield f"{path}.{name}", Params(count // model.dtype.itemsize)
                continue
            params = Params(count) if parameter.ndim > 1 else Params(vector=count)
            yield f"{path}.{name}", params


def _layer_of(path: str) -> int | None:
    """The decoder layer that a path leads into; None outside of them."""
    found = _LAYER.search(f".{path}")
    return None if found is None else int(found[1])


def _without_kv(state: State | None, params: Params) -> Attention:
    if state is None:
        return Attention(Kind.NONE, params, cache=NoCache())
    num_heads = state.recurrent[0] if state.recurrent else 1
    return Attention(Kind.RECURRENT, params, num_heads=num_heads, cache=state)


def _attention(asked: LayerAttention, params: Params) -> Attention:
    cache = asked.cache
    if isinstance(cache, Latent):
        return Attention(
            kind=Kind.MLA,
            params=params,
            num_heads=asked.num_heads,
            cache=cache,
            score_dim=cache.rank + cache.rope_dim,
            mix_dim=cache.rank,
            indexer=asked.indexer,
        )
    return Attention(
        kind=Kind.FULL if cache.window is None else Kind.SLIDING,
        params=params,
        num_heads=asked.num_heads,
        cache=cache.stored,
        score_dim=cache.key_dim,
        mix_dim=cache.value_dim,
        window=cache.window,
    )


def _dtype_name(dtype: object) -> str:
    return _DTYPES[str(dtype).removeprefix("torch.")]
