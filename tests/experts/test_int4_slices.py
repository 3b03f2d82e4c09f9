"""Slices of experts in int4 have the scales of whole experts, or are refused."""

from typing import Any

import pytest
import torch
from tiny_models import make_model

from hotset.errors import ConfigError
from hotset.expert_options import ExpertSlots
from hotset.experts.sizes import slot_bytes_of
from hotset.layout import Layout
from hotset.model.cut_model import ModelCutter
from hotset.parallel import group

INT4 = ExpertSlots(expert_slots=2, expert_cold_dtype="int4")


@pytest.mark.parametrize("cuts", [False, True])  # as an outline, which is whole, and as loaded
@pytest.mark.parametrize(("middle", "fits"), [(128, True), (96, False)])
def test_slices_that_end_within_a_group_are_refused_before_and_after_loading(
    middle: int, fits: bool, cuts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(group, "_current", group.Group(0, Layout(2), cpu, is_alone=True))
    sizes: dict[str, Any] = {"moe_intermediate_size": middle}
    model = make_model("qwen3_moe", **sizes)
    if cuts:
        ModelCutter(model, "qwen3_moe").cut_all(model)
    if fits:
        assert slot_bytes_of(model, INT4) is not None
        return
    words = "int4 has groups of 32 and 2 slices of the experts of this model are 48 wide; use fp8"
    with pytest.raises(ConfigError, match=words):
        slot_bytes_of(model, INT4)
