"""Units of memory. Imports no torch."""

MIB, GIB = 2**20, 2**30


def round_up_gib(num_bytes: float) -> float:
    """In GiB with six decimals (KiB), never below; what a message tells to give."""
    return -int(-num_bytes * 1_000_000 // GIB) / 1_000_000


def gib_text(num_bytes: float, *, up: bool = True) -> str:
    """In GiB with three decimals, six below 1 GiB; rounded up, or down for what there is."""
    digits = 3 if num_bytes >= GIB else 6
    scale = 10**digits
    steps = -(-num_bytes * scale // GIB) if up else num_bytes * scale // GIB
    return f"{steps / scale:.{digits}f} GiB"
