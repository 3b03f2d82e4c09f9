"""What this machine does now."""

from dataclasses import dataclass
from typing import Self

from hotset.cost.calibration import CALIBRATIONS
from hotset.cost.hardware import Hardware

_SMOOTHING = 0.2  # weight of the newest observation in a running mean


@dataclass(slots=True)
class Rates:
    """Measured at start, then followed while the engine runs.

    Attributes:
        prefill_tokens_per_s: tokens of prompts that the model computes; 0 before the first was.
        link_bytes_per_s: by the name of a tier, how fast its payloads reach the device.
        memory_bytes_per_s: at which the device reads its own memory, by its profile.
        expert_bytes_per_s: at which its kernels copy experts out of host memory, by its profile.
    """

    prefill_tokens_per_s: float
    link_bytes_per_s: dict[str, float]
    memory_bytes_per_s: float = 0.0
    expert_bytes_per_s: float = 0.0

    @classmethod
    def of_hardware(cls, hardware: Hardware, *, num_gpus: int = 1) -> Self:
        """What this engine is known to reach there, before anything was measured.

        On each of `num_gpus` GPUs of a host, which all use their links.
        """
        calibration = CALIBRATIONS["hotset"]
        link_bytes_per_s = calibration.link_bytes_per_s(hardware, num_gpus=num_gpus)
        return cls(
            prefill_tokens_per_s=0.0,
            link_bytes_per_s={},
            memory_bytes_per_s=calibration.memory_bytes_per_s(hardware),
            expert_bytes_per_s=link_bytes_per_s * calibration.gather_efficiency,
        )

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Follow the prefill rate with a step that computed `num_tokens`."""
        observed = num_tokens / max(seconds, 1e-9)
        self.prefill_tokens_per_s += _SMOOTHING * (observed - self.prefill_tokens_per_s)

    def observe_link(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Follow the rate of a tier with a transfer of `num_bytes`."""
        observed = num_bytes / max(seconds, 1e-9)
        old = self.link_bytes_per_s.setdefault(tier, observed)
        self.link_bytes_per_s[tier] = old + _SMOOTHING * (observed - old)
