"""One memory budget: what weights take, what KV gets, and how many users that serves."""

from dataclasses import dataclass
from pathlib import Path

from hotset.cgroups import available_host_bytes
from hotset.config import GIB, EngineConfig
from hotset.cost.tuning import TUNINGS
from hotset.errors import ConfigError
from hotset.memory.disk.slab import slot_bytes_for
from hotset.memory.disk.tier import capacity_bytes_for, payloads_within

# Host slots a disk tier needs below a device without a host tier, to pass payloads through.
_STAGING_SLOTS = 64
_REPORTED_CONTEXTS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True)
class Budget:
    """What goes where. Made by `make_budget`.

    Attributes:
        weights_bytes: without `expert_bytes`.
        expert_bytes: of slots and staging buffers of experts that are in host memory.
        device_blocks: KV blocks in the hot tier.
        workspace_bytes: an estimate of what the largest step takes beside weights and KV.
        host_slots: payloads in host memory; more than `host_gib` asks for only to stage a disk.
        disk_bytes: size bound of the disk tier.
        max_model_len: longest context one request can have.
        expert_slots: experts of each layer on the device; None where they are not bounded.
    """

    weights_bytes: int
    workspace_bytes: int
    block_bytes: int
    block_size: int
    device_blocks: int
    host_slots: int
    disk_bytes: int
    max_model_len: int
    expert_bytes: int = 0
    expert_slots: int | None = None

    def report(self, *, device: str, disk_path: Path | None) -> str:
        """The table shown at start."""
        slot_bytes = slot_bytes_for(self.block_bytes)
        disk_slots = payloads_within(self.disk_bytes, slot_bytes)
        rows: list[tuple[str, str, int, int]] = [
            ("weights", device, self.weights_bytes, 0),
            ("workspace", device, self.workspace_bytes, 0),
            ("KV, hot tier", device, self.device_blocks * self.block_bytes, self.device_blocks),
        ]
        if self.expert_bytes:
            rows.insert(1, ("expert slots", device, self.expert_bytes, 0))
        if self.host_slots:
            rows.append(("KV, host tier", "host", self.host_slots * slot_bytes, self.host_slots))
        if self.disk_bytes:
            rows.append(("KV, disk tier", str(disk_path), disk_slots * slot_bytes, disk_slots))
        lines = [f"{'what':<16}{'GiB':>9}{'blocks':>10}{'tokens':>12}  where"]
        for what, where, num_bytes, blocks in rows:
            counts = f"{blocks:>10}{blocks * self.block_size:>12}" if blocks else " " * 22
            lines.append(f"{what:<16}{num_bytes / GIB:>9.3f}{counts}  {where}")
        users = []
        # Payloads in host memory are on the disk too.
        total_blocks = self.device_blocks + max(self.host_slots, disk_slots)
        for context in (*_REPORTED_CONTEXTS, self.max_model_len):
            if context <= self.max_model_len:
                blocks = -(-context // self.block_size)
                users.append(
                    f"{context} tokens: {self.device_blocks // blocks} hot"
                    + (f", {total_blocks // blocks} in all tiers" if self.host_slots else "")
                )
        lines.append("users of a context of " + "; ".join(dict.fromkeys(users)))
        return "\n".join(lines)


def make_budget(
    config: EngineConfig,
    *,
    device: str,
    weights_bytes: int,
    workspace_bytes: int,
    kv_bytes_per_token: int,
    model_max_len: int,
    free_device_bytes: int,
    hot_bytes: int | None,
    expert_bytes: int = 0,
    expert_slots: int | None = None,
) -> Budget:
    """Split the memory the user gave into blocks and slots.

    Args:
        config: the user's sizes.
        device: `cpu` or `cuda`.
        weights_bytes: of the loaded model, without experts that are in host memory.
        workspace_bytes: kept free on the device for the model's steps.
        kv_bytes_per_token: over all layers.
        model_max_len: longest context the model was made for.
        free_device_bytes: memory free on the device with the weights loaded.
        hot_bytes: for KV on the device; None is what is left.
        expert_bytes: what slots for the other experts have taken of it.
        expert_slots: experts of each layer that have them.

    Raises:
        ConfigError: a size that cannot work, with the smallest or largest one that can.
    """
    block_bytes = config.block_size * kv_bytes_per_token
    if workspace_bytes >= free_device_bytes:
        raise ConfigError(
            f"a step of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} requests "
            f"may take {workspace_bytes / GIB:.3f} GiB beside weights and KV, and "
            f"{max(0, free_device_bytes) / GIB:.3f} GiB are free on the {device}; give less "
            "max_num_batched_tokens or max_num_seqs, or a smaller model"
        )
    free_device_bytes -= workspace_bytes
    wanted_len = min(config.max_model_len or model_max_len, model_max_len)
    if hot_bytes is None:  # no more than can ever be used
        hot_bytes = int(free_device_bytes * TUNINGS[device].memory_share)
        most_blocks = config.max_num_seqs * -(-wanted_len // config.block_size)
        hot_bytes = min(hot_bytes, most_blocks * block_bytes)
    if hot_bytes > free_device_bytes:
        raise ConfigError(
            f"hot_gib {hot_bytes / GIB:.3f} is more than the {free_device_bytes / GIB:.3f} GiB "
            f"free on the {device} beside weights "
            f"({(weights_bytes + expert_bytes) / GIB:.3f} GiB) and workspace "
            f"({workspace_bytes / GIB:.3f} GiB); give less, or leave hot_gib out"
        )
    device_blocks = hot_bytes // block_bytes
    needed_blocks = fewest_blocks(config, model_max_len)
    if device_blocks < needed_blocks:
        raise ConfigError(
            f"the hot tier of {hot_bytes / GIB:.6f} GiB holds {device_blocks} KV blocks of "
            f"{block_bytes} bytes, but one request needs {needed_blocks}; "
            f"give hot_gib {_round_up(needed_blocks * block_bytes / GIB)} or more"
        )
    slot_bytes = slot_bytes_for(block_bytes)
    host_slots = int(config.host_gib * GIB) // slot_bytes
    if config.host_gib > 0 and host_slots < 1:
        raise ConfigError(
            f"host_gib {config.host_gib} holds no KV block of {slot_bytes} bytes; "
            f"give {_round_up(slot_bytes / GIB)} or more, or 0 for no host tier"
        )
    if config.disk_gib > 0:
        if payloads_within(int(config.disk_gib * GIB), slot_bytes) < 1:
            smallest_gib = _round_up(capacity_bytes_for(1, slot_bytes) / GIB)
            raise ConfigError(
                f"disk_gib {config.disk_gib} holds no KV block of {slot_bytes} bytes beside its "
                f"index; give {smallest_gib} or more, or 0 for no disk tier"
            )
        host_slots = max(host_slots, _STAGING_SLOTS)
    free_host_bytes = available_host_bytes() - (hot_bytes if device == "cpu" else 0)
    if host_slots * slot_bytes > free_host_bytes:
        raise ConfigError(
            f"the host tier would take {host_slots * slot_bytes / GIB:.3f} GiB but "
            f"{max(0, free_host_bytes) / GIB:.3f} GiB of host memory are free; give less host_gib"
        )
    return Budget(
        weights_bytes=weights_bytes,
        workspace_bytes=workspace_bytes,
        block_bytes=block_bytes,
        block_size=config.block_size,
        device_blocks=device_blocks,
        host_slots=host_slots,
        disk_bytes=int(config.disk_gib * GIB),
        max_model_len=min(wanted_len, device_blocks * config.block_size),
        expert_bytes=expert_bytes,
        expert_slots=expert_slots,
    )


def fewest_blocks(config: EngineConfig, model_max_len: int) -> int:
    """KV blocks that one request needs: for the longest context asked for, else 256 tokens."""
    tokens = min(256 if config.max_model_len is None else config.max_model_len, model_max_len)
    return max(2, -(-tokens // config.block_size))


def _round_up(gib: float) -> float:
    """Six decimals (KiB), never below `gib`."""
    scale = 1_000_000
    return -int(-gib * scale // 1) / scale
