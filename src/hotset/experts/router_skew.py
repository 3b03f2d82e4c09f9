"""Random weights that use experts as unevenly as asked: like those of trained models, or evenly.

Random weights as they are have a way of their own: the hidden states of untrained layers lean to
one direction, which attention gives to all tokens of a request, so that a user's tokens go to the
same few experts from the first layers on. Two changes put a known distribution in its place.

Embeddings are scaled up, so that the residual stream stays mostly the token's own embedding, and
the routing of a token does not depend on its neighbours. Rows of a router are scaled, each by
another factor: of equally likely directions, a longer row has the more extreme logits, and so is
among the largest more often. That needs no bias, which many routers lack, and depends on no other
scale of the model. `cost.routing.skewed_shares` says what it comes to.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from hotset.cost.routing import row_scales
from hotset.errors import ConfigError
from hotset.experts.weights import Experts, experts_layers

# Of the embeddings' values. What a layer adds is near 1; from 1 on, 24 layers route alike.
_EMBEDDING_STD = 16.0


@torch.no_grad()
def skew_routers(model: PreTrainedModel, skew: float, *, seed: int) -> None:
    """Make all routers use experts unevenly, in place; which of them are busy differs by layer.

    Args:
        model: with random weights, on any devices.
        skew: standard deviation of the logarithm of a row's factor; 0 uses all experts alike.
        seed: of the order of the factors in each layer.

    Raises:
        ConfigError: the model has no experts, a router that is not one matrix with a row for each
            of them, or embeddings that its output layer shares, with which a token would follow
            itself; nothing was changed.
    """
    name = type(model).__name__
    routers = [(each.num_experts, _router_of(model, each.module)) for each in experts_layers(model)]
    if not routers:
        raise ConfigError(
            f"router_skew is {skew}, but {name} has no experts of transformers' interface; leave "
            "it out"
        )
    embeddings = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is embeddings:
        raise ConfigError(
            f"router_skew is {skew}, but {name} has one matrix for embeddings and output, with "
            "which random weights repeat one token; leave it out"
        )
    embeddings.mul_(_EMBEDDING_STD / embeddings.float().std())
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for num_experts, weight in routers:
        scales = torch.tensor(row_scales(num_experts, skew), device="cpu")
        order = torch.randperm(num_experts, generator=generator, device="cpu")
        weight.mul_(scales[order].to(weight).unsqueeze(-1))


def _router_of(model: nn.Module, experts: Experts) -> nn.Parameter:
    """The matrix beside `experts` that has a row for each of them."""
    [parent] = [m for m in model.modules() if any(child is experts for child in m.children())]
    own = {id(parameter) for parameter in experts.parameters()}
    found = [
        parameter
        for parameter in parent.parameters()
        if parameter.ndim == 2
        and parameter.shape[0] == experts.num_experts
        and id(parameter) not in own
    ]
    if len(found) != 1:
        raise ConfigError(
            f"router_skew: {len(found)} matrices of {type(parent).__name__} could be its router, "
            "expected one; leave router_skew out for this model"
        )
    return found[0]
