"""What a step takes at most beside weights and KV: one estimate for the engine and the planner."""

from dataclasses import dataclass

from hotset.cost.attention import Kind
from hotset.cost.cache_spec import State
from hotset.cost.shape import ModelShape
from hotset.cost.tuning import TUNINGS

# Of FlashInfer's kernel for decodes, and once more of the one for prompts.
KERNEL_WORKSPACE_BYTES = 384 * 2**20
# With what two dozen wrappers of recorded steps keep their plans in, 8 MiB each.
WORKSPACE_BYTES = 2 * KERNEL_WORKSPACE_BYTES + 24 * 8 * 2**20

# Of keys and values that are made of a piece of a context's latents, on a GPU. They are part of
# `WORKSPACE_BYTES`: attention over latents takes 64 MiB of the kernels' share.
EXPANDED_BYTES = 640 * 2**20

# Of the copy in 16 bits of one layer's 8-bit KV, for prompts. Of Llama-3.1-8B, whose layers have 4
# KiB per token, it holds 65,536 tokens.
WIDENED_BYTES = 256 * 2**20

# Of the scores of sparse attention, float32, one per token of a step and token of the longest
# context: a step that has more scores some tokens after others.
SCORES_BYTES = 256 * 2**20

# Logits of a step that are for prompts' log-probabilities take at most these bytes, by device,
# so that no prompt's are there at once: a longer part of one waits for the next step.
_MOST_SCORED_BYTES = {"cuda": 2**28, "cpu": 2**26}
_LEAST_SCORED_ROWS = 16


def most_scored_rows(vocab_size: int, itemsize: int, device: str) -> int:
    """How many tokens of prompts can be scored in one step, by what their logits take.

    Args:
        vocab_size: V.
        itemsize: bytes of one logit.
        device: `cuda` or `cpu`.
    """
    return max(_LEAST_SCORED_ROWS, _MOST_SCORED_BYTES[device] // (vocab_size * (itemsize + 4)))


@dataclass(frozen=True, slots=True)
class StepWidths:
    """Numbers per token that a layer has at once.

    Attributes:
        hidden: of the residual stream.
        dense: inner width of an MLP; 0 if unknown.
        expert: inner width of an expert; 0 if there is none.
        top_k: experts of a token.
        latent: of absorbed queries and their output over all heads; 0 without latents.
        vocab: of the logits.
        selected: tokens that a token attends to by sparse attention; 0 without it.
        scanned: float32 numbers that a convolution and a scan make of a token; 0 without them.
    """

    hidden: int
    dense: int
    expert: int
    top_k: int
    latent: int
    vocab: int
    selected: int = 0
    scanned: int = 0

    @classmethod
    def of(cls, shape: ModelShape) -> "StepWidths":
        """Those of a planned model, whose MLPs and experts are gated."""
        matrix = 3 * shape.hidden_size
        return cls(
            hidden=shape.hidden_size,
            dense=max(layer.mlp.matrix for layer in shape.layers) // matrix,
            expert=max(layer.expert.matrix for layer in shape.layers) // matrix,
            top_k=shape.top_k_experts,
            latent=max(
                a.num_heads * (a.score_dim + a.mix_dim) if a.kind is Kind.MLA else 0
                for a, _, _ in shape.readers
            ),
            vocab=shape.vocab_size,
            selected=max(a.indexer.top_k if a.indexer else 0 for a, _, _ in shape.readers),
            scanned=max(
                a.cache.scanned_values if isinstance(a.cache, State) else 0
                for a, _, _ in shape.readers
            ),
        )

    @property
    def token_values(self) -> int:
        """Numbers per token of a step.

        The residual stream and its norm, queries, keys and values, and the two halves of the
        feed-forward and their product; or of `top_k` experts these, with input and output of each.
        """
        ffn = 3 * (self.dense or 4 * self.hidden)
        if self.top_k:
            ffn = max(ffn, self.top_k * (2 * self.hidden + 3 * (self.expert or self.dense)))
        return 6 * self.hidden + ffn + self.latent


def step_bytes(
    widths: StepWidths, itemsize: int, *, device: str, max_tokens: int, max_seqs: int, widens: bool
) -> int:
    """What a step of `max_tokens` tokens takes at most beside weights and KV; an upper estimate.

    Live at once: `token_values` of each token; then the logits of `max_seqs` tokens, those of
    prompts that are scored, and their float32 copy. On a GPU recorded steps have the same once
    more, for as many tokens as they have, and logits at a fixed place. Sparse attention has scores,
    and of each token positions and rows.

    Args:
        widths: of the model.
        itemsize: bytes of a number.
        device: `cuda` or `cpu`.
        max_tokens: of a step.
        max_seqs: requests of a step.
        widens: whether KV of 8 bits is widened for prompts.
    """
    token_bytes = widths.token_values * itemsize
    num_logits = min(max_seqs + most_scored_rows(widths.vocab, itemsize, device), max_tokens)
    num_bytes = max_tokens * token_bytes + num_logits * widths.vocab * (itemsize + 4)
    if device == "cuda":
        num_bytes += min(max_tokens, TUNINGS[device].mixed_sizes[-1]) * token_bytes
        num_bytes += 2 * min(max_seqs, max_tokens) * widths.vocab * itemsize
        num_bytes += WORKSPACE_BYTES + (WIDENED_BYTES if widens else 0)
    num_bytes += 4 * max_tokens * widths.scanned
    if widths.selected:
        num_bytes += SCORES_BYTES + 2 * 4 * max_tokens * widths.selected
    return num_bytes
