"""Scoring and selecting in PyTorch: the reference of the kernels, and what runs on a CPU."""

import torch


def score_keys(query: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """How much each query is to attend to each key: `sum_h weights_h * relu(query_h . key)`.

    Args:
        query: `[T, H_i, D]`.
        weights: `[T, H_i]` float32; see `Index`.
        keys: `[N, D]`.

    Returns:
        `[T, N]` float32, without a negative zero, as kernels that compare bits tell the two apart.
    """
    products = torch.matmul(query.float(), keys.float().T)  # [T, H_i, N]
    return torch.matmul(weights.unsqueeze(1), products.relu_()).squeeze(1) + 0.0


def select_positions(scores: torch.Tensor, lengths: torch.Tensor, count: int) -> torch.Tensor:
    """The positions of the highest scores of each row; of equal ones the lower position.

    Args:
        scores: `[T, N]`.
        lengths: `[T]` integers, how many leading scores of a row count.
        count: K, the most that a row selects.

    Returns:
        `[T, K]` int32: positions in ascending order, then -1 where a row has fewer than K.
    """
    num_keys = scores.shape[1]
    places = torch.arange(num_keys, device=scores.device)
    is_beyond = places >= lengths.unsqueeze(1)
    ranked = scores.masked_fill(is_beyond, -torch.inf).sort(descending=True, stable=True).indices
    # Those beyond come last: a score of a row may be -inf too, and is before them.
    found = ranked[:, :count]
    found = found.masked_fill(found >= lengths.unsqueeze(1), num_keys).sort().values
    selected = found.new_full((len(scores), count), -1)
    selected[:, : found.shape[1]] = found.masked_fill(found == num_keys, -1)
    return selected.int()
