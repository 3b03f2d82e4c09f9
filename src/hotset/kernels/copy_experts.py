"""Copying experts from pinned host memory into slots on the device, chosen by the device."""

import torch
import triton
import triton.language as tl

from hotset.cost.tuning import TUNINGS


@triton.jit  # type: ignore[untyped-decorator]
def _copy_experts(  # type: ignore[no-untyped-def]
    source,
    target,
    experts,
    slots,
    num_places,
    num_words,
    slot_words,
    WORDS: tl.constexpr,
):
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    for place in range(tl.program_id(0), num_places, tl.num_programs(0)):
        expert = tl.load(experts + place).to(tl.int64)
        if expert >= 0:
            slot = tl.load(slots + place).to(tl.int64)
            for start in range(part * WORDS, num_words, num_parts * WORDS):
                i = start + tl.arange(0, WORDS)
                inside = i < num_words
                words = tl.load(source + expert * num_words + i, mask=inside)
                tl.store(target + slot * slot_words + i, words, mask=inside)


def copy_experts(
    source: torch.Tensor,
    target: torch.Tensor,
    experts: torch.Tensor,
    slots: torch.Tensor,
    *,
    beside_compute: bool = False,
) -> None:
    """Copy `source[experts[i]]` to `target[slots[i]]`, in place.

    N = copies at most, B = bytes of an expert, a multiple of 8.

    Args:
        source: `[E, B]` uint8, contiguous; pinned host memory, which the device reads itself.
        target: `[S, B]` uint8 on the device, its rows contiguous, any multiple of 8 bytes from one
            to the next. Mutated.
        experts: `[N]` int64 on the device; -1 for no copy.
        slots: `[N]` int64 on the device; distinct where there is a copy.
        beside_compute: other kernels run meanwhile, so take few of the processors.

    Cost: B bytes over the link for each copy. Nothing is asked of the host, so that a CUDA graph
    can record it.
    Reference: `tests/kernels/test_copy_experts.py`, bit-exact.
    """
    if not len(experts):
        return
    words = source.view(torch.int64)
    places = target.view(torch.int64)
    tuning = TUNINGS[target.device.type]
    most = tuning.copies_beside_compute if beside_compute else len(experts)
    _copy_experts[(min(len(experts), most), tuning.copy_programs)](
        words,
        places,
        experts,
        slots,
        len(experts),
        words.shape[1],
        places.stride(0),
        WORDS=tuning.copy_bytes // 8,
        num_warps=8,
    )
