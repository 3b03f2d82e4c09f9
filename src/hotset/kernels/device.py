"""Which device this is, and whose rates it has."""

import torch

from hotset.cost.hardware import Hardware, choose_hardware, load_hardware, nearest_hardware

# Rates of a CPU that was not probed: only their ratios are used, and only where that is said.
_PROFILE_OF_A_CPU = "h200"


def gpu_name(device: torch.device) -> str | None:
    """What the driver calls a GPU; None for another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def known_hardware(device: torch.device, profile: str | None = None) -> Hardware | None:
    """`choose_hardware` for this device: None where its rates are not known."""
    return choose_hardware(profile, gpu_name(device))


def likely_hardware(device: torch.device) -> Hardware:
    """The profile of this device; if there is none, of the GPU with the nearest memory rate."""
    if (known := known_hardware(device)) is not None:
        return known
    if device.type != "cuda":
        return load_hardware(_PROFILE_OF_A_CPU)
    facts = torch.cuda.get_device_properties(device)
    # In kHz and bits; two transfers per clock.
    return nearest_hardware(2e3 * facts.memory_clock_rate * facts.memory_bus_width / 8)
