import pytest
import torch
from tiny_models import make_model
from torch import nn

from hotset.linear import packed as cpu_linear
from hotset.linear.packed import PackedLinear, pack_linears


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 33, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_computes_what_the_plain_one_does(rows: int, bias: bool) -> None:
    linear = nn.Linear(48, 80, bias=bias).requires_grad_(False)
    x = torch.randn(1, rows, 48)

    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_has_the_same_logits_and_no_plain_linear(tied: bool) -> None:
    model = make_model("qwen3", tie_word_embeddings=tied)
    ids = torch.arange(20).unsqueeze(0)
    expected = model(ids).logits

    pack_linears(model)

    assert not any(type(module) is nn.Linear for module in model.modules())
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_large_weight_is_packed_only_where_memory_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("qwen3")
    ids = torch.arange(20).unsqueeze(0)
    expected, head = model(ids).logits, model.lm_head.weight.nbytes
    monkeypatch.setattr(cpu_linear, "_LARGE_BYTES", head)
    monkeypatch.setattr(cpu_linear, "available_host_bytes", lambda: 5 * head)

    pack_linears(model)

    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is PackedLinear
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(cpu_linear, "available_host_bytes", lambda: 5 * head + 1)
    pack_linears(model)
    assert type(model.lm_head) is PackedLinear


def test_other_dtypes_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16))

    pack_linears(model)

    assert type(model[0]) is nn.Linear
