"""The cost model: seconds from bytes, operations and rates. Pure arithmetic, no torch.

The planner, the simulator and the engine's choice between fetching and recomputing use it.
"""

import math


def split_prefix(
    cold_tokens: int,
    *,
    bytes_per_token: float,
    link_bytes_per_s: float,
    link_latency_s: float,
    link_queue_bytes: float,
    prefill_tokens_per_s: float,
    prefill_queue_tokens: float,
) -> int:
    """How many of `cold_tokens` to compute from the front while the rest arrives from the back.

    With `x` tokens computed and `cold_tokens - x` fetched, both at once, the prefix is ready at

        max(compute(x), fetch(cold_tokens - x)), where
        compute(x) = (prefill_queue_tokens + x) / prefill_tokens_per_s               0 at x = 0
        fetch(y)   = link_latency_s + (link_queue_bytes + y * bytes_per_token) / link   0 at y = 0

    `compute` rises with x and `fetch` falls, so the best inner x is where they cross:

        x = (link_latency_s + (link_queue_bytes + cold_tokens * bytes_per_token) / link
             - prefill_queue_tokens / prefill) / (bytes_per_token / link + 1 / prefill)

    The two end points skip one queue (and the latency) altogether, so they are compared with the
    whole numbers on both sides of the crossing. Equal times take the fewest computed tokens, as
    that leaves the chip to others. Prefill is taken as linear in tokens; that a later token costs
    more attention is for the caller to put into `prefill_tokens_per_s`.

    Args:
        cold_tokens: leading tokens of a request that lie in a colder tier.
        bytes_per_token: KV bytes of one token, over all layers.
        link_bytes_per_s: one-way rate from that tier to the device.
        link_latency_s: time until the first byte of a fetch arrives.
        link_queue_bytes: bytes already queued on the link ahead of this fetch.
        prefill_tokens_per_s: rate at which this prefix would be computed.
        prefill_queue_tokens: tokens already queued for prefill ahead of it.

    Returns:
        0 to fetch all, `cold_tokens` to recompute all, or the meeting point between.

    Raises:
        ValueError: a rate or `bytes_per_token` is not positive, or another figure is negative
            or not finite.
    """
    for name, value in (
        ("bytes_per_token", bytes_per_token),
        ("link_bytes_per_s", link_bytes_per_s),
        ("prefill_tokens_per_s", prefill_tokens_per_s),
    ):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected a finite number above 0")
    for name, value in (
        ("cold_tokens", cold_tokens),
        ("link_latency_s", link_latency_s),
        ("link_queue_bytes", link_queue_bytes),
        ("prefill_queue_tokens", prefill_queue_tokens),
    ):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; expected 0 or a finite number above it")

    def ready_s(computed: int) -> float:
        fetched = cold_tokens - computed
        compute_s = (prefill_queue_tokens + computed) / prefill_tokens_per_s if computed else 0.0
        queued_bytes = link_queue_bytes + fetched * bytes_per_token
        fetch_s = link_latency_s + queued_bytes / link_bytes_per_s if fetched else 0.0
        return max(compute_s, fetch_s)

    fetch_all_s = link_latency_s + (
        (link_queue_bytes + cold_tokens * bytes_per_token) / link_bytes_per_s
    )
    lead_s = fetch_all_s - prefill_queue_tokens / prefill_tokens_per_s
    crossing = lead_s / (bytes_per_token / link_bytes_per_s + 1 / prefill_tokens_per_s)
    inner = (min(max(f(crossing), 0), cold_tokens) for f in (math.floor, math.ceil))
    return min(sorted({0, *inner, cold_tokens}), key=ready_s)
