"""What this machine does now."""

from dataclasses import dataclass

_SMOOTHING = 0.2  # weight of the newest observation in a running mean


@dataclass(slots=True)
class Rates:
    """Measured at start, then followed while the engine runs.

    Attributes:
        prefill_tokens_per_s: tokens of prompts that the model computes.
        link_bytes_per_s: by the name of a tier, how fast its payloads reach the device.
    """

    prefill_tokens_per_s: float
    link_bytes_per_s: dict[str, float]

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """Follow the prefill rate with a step that computed `num_tokens`."""
        observed = num_tokens / max(seconds, 1e-9)
        self.prefill_tokens_per_s += _SMOOTHING * (observed - self.prefill_tokens_per_s)

    def observe_link(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Follow the rate of a tier with a transfer of `num_bytes`."""
        observed = num_bytes / max(seconds, 1e-9)
        old = self.link_bytes_per_s.setdefault(tier, observed)
        self.link_bytes_per_s[tier] = old + _SMOOTHING * (observed - old)
