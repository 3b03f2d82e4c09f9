"""Merged projections: the same output, and one product a group once compiled."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_models import make_model
from torch._dynamo.backends.common import aot_autograd
from transformers.modeling_layers import GradientCheckpointingLayer

from hotset.cost.tuning import TUNINGS
from hotset.linear.merged import MergedLinear, merge_linears


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_merged_layer_computes_the_same_with_one_product_a_group(family: str) -> None:
    model = make_model(family)
    tokens = torch.arange(3, 30).unsqueeze(0)
    products: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        products.update(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
        num_parameters = sum(p.numel() for p in model.parameters())
        merge_linears(model)
        assert sum(p.numel() for p in model.parameters()) == num_parameters
        assert torch.allclose(model(tokens, use_cache=False).logits, expected, atol=1e-4)
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        torch._dynamo.reset()
        layers[0].compile(dynamic=True, backend=aot_autograd(fw_compiler=count))
        assert torch.allclose(model(tokens, use_cache=False).logits, expected, atol=1e-4)
    torch._dynamo.reset()
    # Queries with keys and values, attention's output, gate with up, down.
    assert products["aten.mm.default"] == 4


@pytest.mark.parametrize("bias", [False, True])
def test_large_layers_compute_their_own_columns_of_many_rows(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = replace(TUNINGS["cuda"], apart_columns=48, apart_from_rows=20)
    monkeypatch.setitem(TUNINGS, "cuda", tuning)
    model = make_model("llama", intermediate_size=48, mlp_bias=bias)  # keys have fewer columns
    wholes: Counter[int] = Counter()
    with torch.inference_mode():
        for num_tokens in (19, 20, 21):
            tokens = torch.arange(3, 3 + num_tokens).unsqueeze(0)
            expected = model(tokens, use_cache=False).logits
            merged = copy.deepcopy(model)
            merge_linears(merged)
            for layer in {m.whole for m in merged.modules() if isinstance(m, MergedLinear)}:
                layer.register_forward_hook(lambda *args, num=num_tokens: wholes.update([num]))
            assert torch.allclose(merged(tokens, use_cache=False).logits, expected, atol=1e-4)
    num_layers = model.config.num_hidden_layers
    assert wholes == {19: 2 * num_layers, 20: num_layers, 21: num_layers}
