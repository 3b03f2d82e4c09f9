"""What has to be the same on all ranks."""

import sys

import torch
import transformers

from hotset.parallel.group import current


def machine_facts() -> dict[str, str]:
    """This rank's software and device."""
    device = current().device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": kind,
        "Python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def first_difference(ours: dict[str, str], rank: int, theirs: dict[str, str]) -> str | None:
    """One line on what another rank has and rank 0 has not; None where all is the same."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            return (
                f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 {value!r}: all ranks need "
                "the same"
            )
    return None
