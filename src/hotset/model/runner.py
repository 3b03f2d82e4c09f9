"""Running a transformers model for one step over the paged KV cache."""

import inspect
import logging
from collections.abc import Callable
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hotset.errors import ModelError
from hotset.memory.arena import DeviceArena
from hotset.model.attention import Attention, PagedAttention, register
from hotset.model.batch import Batch, Inputs, make_batch
from hotset.model.flashinfer_attention import FlashInferBackend, why_unsupported
from hotset.model.inspection import ModelLayout
from hotset.model.merged_linear import merge_linears
from hotset.model.routing_recorder import RoutingRecorder
from hotset.model.step_graphs import StepGraphs
from hotset.request import StepPlan

_log = logging.getLogger(__name__)


class AttentionBackend(Protocol):
    """Makes the attention of one step after another."""

    def begin_step(self, batch: Batch, inputs: Inputs) -> Attention:
        """The attention of a step; good until the next call."""
        ...


class GatherBackend:
    """PyTorch's SDPA over gathered blocks; see `PagedAttention`."""

    def __init__(self, arena: DeviceArena) -> None:
        self._arena = arena

    def begin_step(self, batch: Batch, inputs: Inputs) -> Attention:
        """See `AttentionBackend`."""
        return PagedAttention(self._arena, batch, inputs)


def choose_backend(arena: DeviceArena, layout: ModelLayout) -> AttentionBackend:
    """FlashInfer on a GPU, for the models that it can run; SDPA for the others."""
    if arena.storage.device.type != "cuda":
        return GatherBackend(arena)
    reason = why_unsupported(layout.layers, layout.dtype)
    if reason is not None:
        _log.warning("FlashInfer cannot run %s: attention by SDPA, which is slower", reason)
        return GatherBackend(arena)
    return FlashInferBackend(arena, layout.layers)


class ModelRunner:
    """Turns a step plan into tensors, runs the model, and returns logits.

    Args:
        model: switched to paged attention by `inspect_model`.
        arena: where the KV lives.
        attention: how it is attended to.
        max_num_seqs: most requests in one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arena: DeviceArena,
        attention: AttentionBackend,
        *,
        max_num_seqs: int = 256,
    ) -> None:
        self._model = model
        self._arena = arena
        self._attention = attention
        self._graphs: StepGraphs | None = None
        self.recorder: RoutingRecorder | None = None
        # By the number of tokens, whether a step is launched although it is recorded.
        self.launches: Callable[[int], bool] = lambda num_tokens: False
        # At a fixed place, for the graphs to read.
        self._previous = torch.zeros(max_num_seqs, dtype=torch.long, device=model.device)
        parameters = inspect.signature(model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters

    @torch.inference_mode()
    def compile(
        self,
        *,
        max_num_tokens: int,
        max_context_blocks: int,
        scratch_block: int,
        before_cut: Callable[[], None] | None = None,
        records: bool = True,
    ) -> None:
        """Compile the model's layers, and record steps as CUDA graphs where that works.

        Args:
            max_num_tokens: most tokens of a step.
            max_context_blocks: most blocks that one request can have.
            scratch_block: a block of the arena that no request gets.
            before_cut: see `StepGraphs`.
            records: whether steps can be recorded; not where the host takes part in them.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        # Decodes of one token, and layers that attend in different ways, are compiled apart.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        register(traced=False)
        merge_linears(self._model)
        # To round a long row to 8 bits takes its largest number: one kernel for both, not three
        # that compute the row again.
        options = {"split_reductions": False} if self._model.device.type == "cuda" else {}
        for module in self._model.modules():
            # Another engine may have compiled the same model.
            if isinstance(module, GradientCheckpointingLayer) and not module._compiled_call_impl:
                module.compile(dynamic=True, options=options)
        if not records or not isinstance(self._attention, FlashInferBackend):
            return
        try:
            self._graphs = StepGraphs(
                self._logits,
                self._attention,
                self._previous,
                max_num_tokens=max_num_tokens,
                max_context_blocks=max_context_blocks,
                scratch_block=scratch_block,
                before_cut=before_cut,
            )
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"the model cannot be compiled here ({reason}); try again with eager"
            ) from error
        except RuntimeError as error:
            # A layer that asks the host while it runs, as loops over experts do.
            _log.warning("steps run without CUDA graphs, which is slower: %s", error)

    @torch.inference_mode()
    def forward(
        self,
        plan: StepPlan,
        previous: torch.Tensor | None = None,
        when_ready: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Start computing the plan's tokens and storing their KV.

        Args:
            plan: what to compute.
            previous: `[R]` tokens that the step before chose, for requests that have a
                `pending_row`; on the model's device.
            when_ready: called once all that the step copies to the device was submitted, and
                before what it computes is.

        Returns:
            `[R + P, vocab]` logits, in the plan's order: a row for each item that samples, then
            one for each of the items' `scored` tokens. Good until the next call.
        """
        if self.recorder is not None:
            self.recorder.begin_step(sum(item.num_tokens for item in plan.items))
        self._arena.copy_blocks(plan.copies)
        batch = make_batch(plan.items, self._arena.block_size)
        if batch.has_unknown:
            assert previous is not None, "a token is unknown and nobody is choosing it"
            self._previous[: len(previous)].copy_(previous)
        is_recorded = self._graphs is not None and not len(batch.scored_rows)
        if is_recorded and not self.launches(batch.num_tokens):
            assert self._graphs is not None
            logits = self._graphs.run(batch, when_ready)
            if logits is not None:
                return logits
        inputs, rows = batch.to(self._model.device)
        token_ids = inputs.resolve(self._previous) if batch.has_unknown else inputs.token_ids
        attention = self._attention.begin_step(batch, inputs)
        when_ready()
        return self._logits(token_ids, inputs.positions, attention, rows)

    def _logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[R, vocab]` logits of `rows` of `[T]` tokens; of all for None."""
        options = {} if rows is None or not self._selects_logits else {"logits_to_keep": rows}
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            hotset=attention,
            **options,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if rows is None or self._selects_logits else logits[rows]
