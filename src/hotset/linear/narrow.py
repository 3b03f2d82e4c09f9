"""Linear layers and embeddings of narrow weights, on a CPU."""

import torch
from torch import nn

from hotset.linear.tile_product import multiply
from hotset.linear.tiles import Tiles


class NarrowLinear(nn.Module):
    """What `nn.Linear` computes, from a narrow weight; sums and products in float32.

    It has what model code reads of a linear layer; `weight` is widened at each reading.

    Attributes:
        tiles: the weight, which an embedding may share.
    """

    bias: torch.Tensor | None

    def __init__(self, tiles: Tiles, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = tiles.num_columns, tiles.num_rows
        self.tiles = tiles
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """`[out, in]` float32, in memory of its own."""
        return self.tiles.rows(torch.arange(self.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`, in the dtype of `x`."""
        out = multiply(x.reshape(-1, self.in_features).float().contiguous(), self.tiles)
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


class NarrowEmbedding(nn.Module):
    """What `nn.Embedding` computes, from a narrow table.

    Attributes:
        tiles: the table, which the layer that makes logits may share.
        dtype: of the output.
    """

    def __init__(self, tiles: Tiles, dtype: torch.dtype) -> None:
        super().__init__()
        self.tiles, self.dtype = tiles, dtype

    @property
    def weight(self) -> torch.Tensor:
        """`[tokens, width]`, in memory of its own."""
        return self.tiles.rows(torch.arange(self.tiles.num_rows)).to(self.dtype)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[...]` ids to `[..., width]`."""
        rows = self.tiles.rows(token_ids.reshape(-1).long()).to(self.dtype)
        return rows.view(*token_ids.shape, -1)


def narrow_tiles(model: nn.Module) -> list[Tiles]:
    """The narrow weights of a model, each once."""
    found = {
        id(module.tiles): module.tiles
        for module in model.modules()
        if isinstance(module, NarrowLinear | NarrowEmbedding)
    }
    return list(found.values())
