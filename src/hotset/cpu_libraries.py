"""How the libraries that compute on a CPU are set up: OpenMP waiting, threads, oneDNN memory.

They read the environment: OpenMP when torch loads it, oneDNN and what PyTorch has above it when
they compute for the first time. A variable that the user has set stays as it is.
"""

import os
import sys

from hotset.cgroups import usable_cpus
from hotset.errors import ConfigError

# By default a thread that waits for the others spins for some milliseconds. Where another process
# wants the core, the spinning thread keeps it, or a thread of its own process, from running: two
# threads then take many times as long as one (docs/cpu.md).
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
# Compiled code that is kept, for each number of rows and shape of weights: by default 1024 entries
# of about 0.5 to 1 MiB each in both. A step needs one for each shape of its weights, and with
# experts some more; to compile one again takes 0.2 to 1 ms.
_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def set_waiting() -> None:
    """Have threads of OpenMP wait without spinning. Does nothing once torch is loaded."""
    if "torch" not in sys.modules:
        _set(_WAITING)


def bound_kernels() -> None:
    """Bound the compiled code that is kept. Does nothing once a product was computed."""
    _set(_KERNELS)


def set_threads(threads: int | None) -> int:
    """Set the threads that torch computes with, in this process.

    Args:
        threads: None is torch's own number, or what affinity and quota allow if that is less.

    Returns:
        their number.

    Raises:
        ConfigError: more than affinity and quota allow; nothing was set.
    """
    import torch

    most = usable_cpus()
    if threads is not None and threads > most:
        raise ConfigError(
            f"threads is {threads}, but this process can keep {most} CPUs busy, by its affinity "
            f"and the CPU quota of its cgroup; expected 1 to {most}, or leave it out"
        )
    wanted: int = min(torch.get_num_threads(), most) if threads is None else threads
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)
    return wanted


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)
