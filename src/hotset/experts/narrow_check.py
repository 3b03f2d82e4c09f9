"""A trial of the kernels that read narrow experts, before any answer depends on them."""

import torch

from hotset.errors import ModelError
from hotset.experts.compute import gate
from hotset.experts.narrow import NarrowLayout
from hotset.experts.random_payloads import random_payloads
from hotset.experts.weights import LayerExperts
from hotset.linear.eight_bit import reference_product

_NUM_EXPERTS = 2
_NUM_TOKENS = (1, 48)  # of small tiles and of larger ones
_MOST_ERROR = 1e-2  # of the norm; rounding to 16 bits gives a third of it


@torch.inference_mode()
def check_narrow_kernels(experts: LayerExperts, layout: NarrowLayout, device: torch.device) -> None:
    """Have the kernels compute random experts of a layer's form, and compare with widened ones.

    Args:
        experts: of a layer, with a `gate` that kernels know.
        layout: of its payloads.
        device: the one that will compute them.

    Raises:
        ModelError: the products differ by more than rounding.
    """
    from hotset.kernels.narrow_experts import narrow_experts

    assert experts.gate is not None
    dtype = experts.layout.dtype
    generator = torch.Generator().manual_seed(0)
    payloads = random_payloads(layout, _NUM_EXPERTS, std=0.1, generator=generator).to(device)
    addresses = payloads.data_ptr() + layout.payload_bytes * torch.arange(_NUM_EXPERTS)
    biases = experts.biases
    if biases is not None:
        biases = biases[0][:_NUM_EXPERTS].contiguous(), biases[1][:_NUM_EXPERTS].contiguous()
    up, down = layout.matrices
    for num_tokens in _NUM_TOKENS:
        hidden = torch.randn(num_tokens, layout.matrices[0].shape[-1], generator=generator)
        hidden = hidden.to(device, dtype)
        weights = torch.rand(num_tokens, _NUM_EXPERTS, generator=generator).to(device, dtype)
        expected = torch.zeros(hidden.shape, device=device)
        for number, payload in enumerate(payloads):
            rows = reference_product(hidden, payload, up)
            if biases is not None:
                rows += biases[0][number].float()
            rows = gate(experts.module, experts, rows).to(dtype)
            rows = reference_product(rows, payload, down)
            if biases is not None:
                rows += biases[1][number].float()
            expected += rows * weights[:, number : number + 1].float()
        ids = torch.arange(_NUM_EXPERTS, device=device).expand(num_tokens, -1).contiguous()
        got = narrow_experts(
            hidden, ids, weights, addresses.to(device), layout, experts.gate, biases=biases
        )
        error = float((got.float() - expected).norm() / expected.norm())
        if not error <= _MOST_ERROR:
            raise ModelError(
                f"the kernels for experts in {layout.name} computed something else on this "
                f"{device.type} than their widened weights give, by {error:.1%} of it, where "
                f"{_MOST_ERROR:.0%} would be rounding; another expert_cold_dtype has them widened "
                "in slots; please report this"
            )
