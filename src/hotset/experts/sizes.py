"""What slots for a model's experts take on the device, and what its layers cannot do."""

from transformers import PreTrainedModel

from hotset.config import GIB, EngineConfig
from hotset.cost.slot_bytes import SlotBytes, count_slots
from hotset.errors import ConfigError
from hotset.experts.gating import layers_to_gate
from hotset.experts.narrow import NarrowLayout
from hotset.experts.weights import LayerExperts


def slot_bytes_of(model: PreTrainedModel, config: EngineConfig) -> SlotBytes | None:
    """What slots of a model's experts take; None where its experts cannot be buffered.

    Raises:
        ConfigError: they are in host memory in other bits than `config` asks for.
    """
    layers = layers_to_gate(model)
    return sizes_of(layers, config) if len(_kinds(layers)) == 1 else None


def check_buffering(model: PreTrainedModel, config: EngineConfig) -> None:
    """Refuse what `buffer_experts` would for the model's layers; `model` may be on `meta`.

    Raises:
        ConfigError: buffering cannot be done, or the budget is too small.
    """
    check_layers(model, layers_to_gate(model), config)
    sizes = sizes_of(layers_to_gate(model), config)
    num_slots_of(config, sizes)


def check_layers(model: PreTrainedModel, layers: list[LayerExperts], config: EngineConfig) -> None:
    """Raise ConfigError where there are no layers, or of several kinds, or on several ranks."""
    names = ("expert_slots", "expert_gib", "hot_gib", "total_gib")
    asked = next(name for name in names if getattr(config, name) is not None)
    given = f"{asked} is {getattr(config, asked)}"
    name = type(model).__name__
    if not layers:
        raise ConfigError(
            f"{given}, but {name} has no experts that can be kept in host memory: it is dense, or "
            f"computes its experts in its own way; leave {asked} out"
        )
    if any(experts.shard is not None for experts in layers):
        raise ConfigError(
            f"{given}, but the experts of this {name} are spread over ranks, which does not go "
            f"with keeping them in host memory yet; leave {asked} out"
        )
    kinds = _kinds(layers)
    if len(kinds) > 1:
        raise ConfigError(
            f"{given}, but the layers of {name} have experts of {len(kinds)} sizes, which are not "
            f"supported; leave {asked} out"
        )


def sizes_of(layers: list[LayerExperts], config: EngineConfig) -> SlotBytes:
    """What slots of these layers take.

    Raises:
        ConfigError: they are in host memory in other bits than `config` asks for.
    """
    first = layers[0]
    narrow = narrow_layout(first, config)
    return SlotBytes(
        config.expert_plan,
        len(layers),
        first.num_experts,
        first.layout.payload_bytes,
        None if narrow is None else narrow.payload_bytes,
    )


def narrow_layout(experts: LayerExperts, config: EngineConfig) -> NarrowLayout | None:
    """How host memory is to have experts, or ConfigError if it has them otherwise."""
    asked, layout = config.expert_cold_dtype, experts.layout
    narrow = None if asked == "auto" else NarrowLayout(layout.up, layout.down, asked)
    if experts.hosted is not None:
        stored = experts.hosted.source.narrow
        has = "auto" if stored is None else stored.dtype
        if has != asked:
            raise ConfigError(
                f"expert_cold_dtype is {asked}, but the experts of this model are in host memory "
                f"as {has} already; load it again"
            )
    return narrow


def num_slots_of(config: EngineConfig, sizes: SlotBytes, solved: int | None = None) -> int:
    """Experts of a layer that stay on the device: as solved, or else as asked for.

    Raises:
        ConfigError: the budget holds too few, or another option does nothing with that number.
    """
    if solved is not None:
        num_slots = solved
    elif config.expert_slots is not None:
        num_slots = config.expert_slots
        if num_slots > sizes.num_experts:
            raise ConfigError(
                f"expert_slots is {config.expert_slots}, but a layer has {sizes.num_experts} "
                "experts; give so many or fewer"
            )
    else:
        assert config.expert_gib is not None
        found = count_slots(int(config.expert_gib * GIB), sizes.num_experts, sizes)
        if found is None:
            least = sizes(sizes.fewest)
            raise ConfigError(
                f"expert_gib {config.expert_gib} holds too little: the plan {sizes.plan} needs "
                f"{-(-least * 1_000_000 // GIB) / 1_000_000} or more for the experts of this model"
            )
        num_slots = found
    _check_effects(config, num_slots, sizes.num_experts)
    return num_slots


def _check_effects(config: EngineConfig, num_slots: int, num_experts: int) -> None:
    """Raise ConfigError for an option that does nothing, or cannot, with `num_slots` slots."""
    for name, default in (
        ("expert_cold_dtype", "auto"),
        ("expert_prefetch", 0),
        ("expert_host_gib", None),
        ("expert_cpu", "off"),
    ):
        value = getattr(config, name)
        if value != default and num_slots == num_experts:
            raise ConfigError(
                f"{name} is {value}, which does nothing while all experts are on the device, as "
                "they are here; leave it out, or give them less memory"
            )
    if config.expert_prefetch > num_slots:
        raise ConfigError(
            f"expert_prefetch is {config.expert_prefetch}, but a layer keeps {num_slots} experts; "
            "expected so many or fewer"
        )


def _kinds(layers: list[LayerExperts]) -> set[tuple[object, ...]]:
    return {(experts.num_experts, experts.layout, experts.is_transposed) for experts in layers}
