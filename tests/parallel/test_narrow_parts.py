"""Parts of matrices in few bits are those of the widened ones, bit for bit."""

from dataclasses import replace

import pytest
import torch

from hotset.linear.narrow_matrix import NarrowMatrix
from hotset.linear.quant_linear import random_payload
from hotset.parallel.narrow_parts import can_cut, cut_planes, halved
from hotset.parallel.parts import Part
from hotset.weight_format import AWQ_128, FP8_BLOCK, FP8_ROW, INT4, MXFP4, NVFP4, WeightFormat

FORMS = [FP8_ROW, FP8_BLOCK, MXFP4, NVFP4, INT4, AWQ_128]
SHAPE = (416, 544)  # that end within a block of 128


def widened_part(form: WeightFormat, kept: WeightFormat, part: Part) -> tuple[torch.Tensor, ...]:
    """A part of a random matrix, cut before it is widened and after."""
    whole = NarrowMatrix.of(form, SHAPE)
    payload = random_payload(whole, torch.Generator().manual_seed(0))
    shape = (part.length, SHAPE[1]) if part.dim == 0 else (SHAPE[0], part.length)
    matrix = NarrowMatrix.of(kept, shape)
    cut = torch.zeros(matrix.end, dtype=torch.uint8)
    planes = cut_planes(whole.views(payload), form, kept, part)
    for view, plane in zip(matrix.views(cut), planes, strict=True):
        if view is not None and plane is not None:
            view.copy_(plane)
    return matrix.widened(cut, torch.float32), part.of(whole.widened(payload, torch.float32))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize(
    "part",
    [
        Part(0, (slice(128, 256),)),
        Part(0, (slice(0, 128), slice(256, 416))),
        Part(1, (slice(256, 544),)),
        Part(1, (slice(128, 256), slice(384, 512))),
    ],
    ids=str,
)
def test_a_part_is_that_of_the_widened_matrix(form: WeightFormat, part: Part) -> None:
    assert can_cut(form, SHAPE[part.dim], part)
    assert torch.equal(*widened_part(form, form, part))


@pytest.mark.parametrize(
    ("form", "part", "groups"),
    [
        (FP8_BLOCK, Part(0, (slice(96, 192),)), (32, 128)),
        (FP8_BLOCK, Part(1, (slice(192, 384),)), (128, 64)),
        (MXFP4, Part(1, (slice(48, 96),)), (1, 16)),
        (AWQ_128, Part(1, (slice(96, 192),)), (1, 32)),
        (NVFP4, Part(1, (slice(8, 24),)), (1, 8)),
    ],
    ids=str,
)
def test_groups_that_a_slice_divides_are_halved(
    form: WeightFormat, part: Part, groups: tuple[int, int]
) -> None:
    length = SHAPE[part.dim]
    assert not can_cut(form, length, part)
    kept = halved(form, [(length, part)])
    assert (kept.rows, kept.columns) == groups and can_cut(kept, length, part)
    assert kept == replace(form, rows=groups[0], columns=groups[1])
    assert torch.equal(*widened_part(form, kept, part))


def test_a_slice_within_a_byte_cannot_be_cut() -> None:
    odd = Part(1, (slice(0, 31),))
    assert not can_cut(halved(MXFP4, [(544, odd)]), 544, odd)
    assert can_cut(FP8_ROW, 544, odd)
