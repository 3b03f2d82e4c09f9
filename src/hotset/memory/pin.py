"""Host memory that the device can read and write: pinned where it is, page by page."""

import weakref
from collections.abc import Callable

import torch


def pin(address: int, num_bytes: int) -> int:
    """Pin host memory; the CUDA error code, or 0 where it is done. Else it stays as it is."""
    return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))


def unpin(address: int) -> None:
    """Unpin what was pinned at `address`. No copy of it may be under way."""
    torch.cuda.cudart().cudaHostUnregister(address)


def unpin_with(owner: object, address: int) -> Callable[[], object]:
    """A function that unpins it; it runs at the end of `owner` at the latest.

    The driver takes memory for pinned that was given back and is something else's now. A process
    that ends unpins nothing.
    """
    finalizer = weakref.finalize(owner, unpin, address)
    finalizer.atexit = False
    return finalizer
