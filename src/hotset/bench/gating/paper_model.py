"""A decoder of the paper's kind, whose MoE layers are computed in any of the ways.

Source: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from hotset.bench.gating.static import Experts, Shape, make_layer, route
from hotset.errors import ConfigError

_HEAD_DIM = 64


class PaperModel(nn.Module):
    """A decoder of the paper's kind: every second feed-forward is MoE.

    Without embedding and output head, which are the same for every way.
    """

    def __init__(self, shape: Shape, num_layers: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        d = shape.hidden
        self.shape = shape
        self.num_heads = max(1, d // _HEAD_DIM)
        if d % self.num_heads:
            raise ConfigError(f"a hidden size of {d} does not divide into heads of {_HEAD_DIM}")
        with torch.device(device):
            self.norms = nn.ModuleList(nn.LayerNorm(d, dtype=dtype) for _ in range(2 * num_layers))
            self.qkv = nn.ModuleList(nn.Linear(d, 3 * d, dtype=dtype) for _ in range(num_layers))
            self.out = nn.ModuleList(nn.Linear(d, d, dtype=dtype) for _ in range(num_layers))
            self.dense = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(d, shape.ffn, dtype=dtype),
                    nn.ReLU(),
                    nn.Linear(shape.ffn, d, dtype=dtype),
                )
                for _ in range(num_layers - num_layers // 2)
            )
            self.routers = nn.ParameterList(
                torch.randn(shape.num_experts, d, dtype=dtype) for _ in range(num_layers // 2)
            )
        self.moe = nn.ModuleList(
            make_layer(shape, device=device, dtype=dtype, seed=layer)
            for layer in range(num_layers // 2)
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, experts: Sequence[Experts]) -> torch.Tensor:
        """`[B, T, d]` to the same; `experts` compute the MoE layers, in order."""
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            x = x + out(self._attend(qkv(self.norms[2 * layer](x))))
            rows = self.norms[2 * layer + 1](x)
            if layer % 2 == 0:
                x = x + self.dense[layer // 2](rows)
                continue
            flat = rows.flatten(0, 1)
            ids, weights = route(flat, self.routers[layer // 2], self.shape.top_k)
            x = x + experts[layer // 2](flat, ids, weights).view_as(x)
        return x

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        batch, length, _ = qkv.shape
        heads = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return attended.transpose(1, 2).flatten(2)
