"""Running a transformers model for one step over the paged KV cache."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hotset.attention.backend import AttentionBackend, RecordableBackend, StepAttention
from hotset.attention.batch import NUM_INPUTS, Batch
from hotset.attention.gather import GatherBackend
from hotset.attention.hook import register
from hotset.attention.hot_rows import HotRows
from hotset.attention.inputs import Inputs, copy_batch
from hotset.attention.mixers import step_keywords
from hotset.attention.sparse.indexer import mask_arguments
from hotset.attention.state_step import StateLayers
from hotset.errors import ModelError
from hotset.executor.graphs import StepGraphs
from hotset.executor.probe import ModelLayout
from hotset.executor.rows.program import RowProgram
from hotset.executor.rows.trial import make_program
from hotset.executor.step_input import StepInput
from hotset.experts.recorder import RoutingRecorder
from hotset.libraries import first_line
from hotset.linear.merged import merge_linears
from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena
from hotset.metrics import HotCounts
from hotset.parallel.group import current

_log = logging.getLogger(__name__)

_SIZES_AT_START = 2
_TRIAL_TOKENS = 2  # any number but one stands for all others


@contextmanager
def _compiling() -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the model cannot be compiled here ({reason}); try again with eager"
        ) from error


class ModelRunner:
    """Turns steps into tensors, runs the model, and returns logits.

    Args:
        model: switched to paged attention by `inspect_model`.
        arena: where the KV lives.
        attention: how it is attended to.
        max_num_seqs: most requests in one step.
        num_lanes: whose requests have their tokens chosen together.
        hot: the rows of hot requests, which `attention` reads; None where none may be hot.
        states: where state lives beside KV; None where the model has none.
        kv_layers: index of a layer that attends -> which of those it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arena: DeviceArena,
        attention: AttentionBackend,
        *,
        max_num_seqs: int = 256,
        num_lanes: int = 1,
        hot: HotRows | None = None,
        states: StateArena | None = None,
        kv_layers: dict[int, int] | None = None,
    ) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._states = states
        self._state_layers: StateLayers | None = None
        if states is not None:
            self._state_layers = StateLayers(states, kv_layers or {}, model.device)
        self._hot = hot
        self._arena = arena
        self._attention = attention
        self._graphs: StepGraphs | None = None
        self._program: RowProgram | None = None
        self.recorder: RoutingRecorder | None = None
        # By the number of tokens, whether a step is launched although it is recorded.
        self.launches: Callable[[int], bool] = lambda num_tokens: False
        self._max_num_seqs = max_num_seqs
        # At a fixed place, for the graphs to read.
        size = num_lanes * max_num_seqs
        self._previous = torch.zeros(size, dtype=torch.long, device=model.device)
        parameters = inspect.signature(model.forward).parameters
        self._selects_logits = "logits_to_keep" in parameters
        self._mask = mask_arguments(model)
        self._keywords = step_keywords(model)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @torch.inference_mode()
    def compile(self, scratch_block: int) -> None:
        """Compile the model's layers; on a GPU by a trial, which needs no attention kernels.

        Args:
            scratch_block: a block of the arena that no request gets.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        # By default in /tmp, which a restart may empty. PyTorch finds what it compiled by the code,
        # the device and its own version.
        kept = Path(platformdirs.user_cache_dir("hotset")) / "compiled"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))
        # Decodes of one token, and layers that attend in different ways, are compiled apart.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        register(traced=False)
        merge_linears(self._model)
        # Rounded where PyTorch rounds: what is compiled together depends on where experts are, and
        # answers must not.
        options = {"emulate_precision_casts": True}
        if self._model.device.type == "cuda":
            # To round a long row to 8 bits takes its largest number: one kernel for both, not three
            # that compute the row again.
            options["split_reductions"] = False
        for module in self._model.modules():
            # Another engine may have compiled the same model.
            if isinstance(module, GradientCheckpointingLayer) and not module._compiled_call_impl:
                module.compile(dynamic=True, options=options)
        if isinstance(self._attention, RecordableBackend):
            # Of the class that all steps have, as compiled code is made for a class.
            rows = self._previous.new_zeros(NUM_INPUTS, _TRIAL_TOKENS)
            rows[2] = scratch_block
            inputs = Inputs(*rows.unbind())
            attention = self._attention.step_with(inputs, lambda layer, query, *_: query)
            if self._state_layers is not None:
                states = self._state_layers.record(_TRIAL_TOKENS, _TRIAL_TOKENS, is_decode=True)
                attention = self._state_layers.around(attention, states)
            with _compiling():
                self._logits(inputs.token_ids, inputs.positions, attention, None)

    @torch.inference_mode()
    def compile_rows(self, layout: ModelLayout, scratch_block: int) -> None:
        """Compile steps of a model with narrow weights on a CPU, where that works.

        Args:
            layout: of the model.
            scratch_block: a block of the arena that no request gets; written.
        """
        has_more = self._hot is not None or layout.states or layout.indices is not None
        if isinstance(self._attention, GatherBackend) and not has_more:
            self._program = make_program(
                self._model,
                self._arena,
                layout.layers,
                self._attention,
                self._logits,
                scratch_block,
            )

    def load_kernels(self, *, waits: bool) -> None:
        """Wait for the attention kernels that any step needs, or for all.

        Raises:
            ModelError: they cannot be built.
        """
        if isinstance(self._attention, RecordableBackend):
            self._attention.load()
            self._attention.use_all_kernels(waits=waits)

    def record(
        self,
        *,
        max_num_tokens: int,
        max_context_blocks: int,
        scratch_block: int,
        before_cut: Callable[[], None] | None = None,
        defers: bool = False,
    ) -> None:
        """Record steps as CUDA graphs, after `compile`, where that works.

        Args:
            max_num_tokens: most tokens of a step.
            max_context_blocks: most blocks that one request can have.
            scratch_block: a block of the arena that no request gets.
            before_cut: see `StepGraphs`.
            defers: whether most sizes are left to `warm_up`.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        if not isinstance(self._attention, RecordableBackend):
            return
        self._graphs = StepGraphs(
            self._logits,
            self._attention,
            self._previous,
            max_num_seqs=self._max_num_seqs,
            max_num_tokens=max_num_tokens,
            max_context_blocks=max_context_blocks,
            scratch_block=scratch_block,
            before_cut=before_cut,
            states=self._state_layers,
        )
        # The second size has one token, which is compiled apart.
        num_sizes = 0
        while self.is_warming and not (defers and num_sizes == _SIZES_AT_START):
            self.warm_up()
            num_sizes += 1

    @property
    def is_warming(self) -> bool:
        """Whether `warm_up` has something to do, now or later."""
        if self._graphs is not None:
            return not self._graphs.is_complete
        return isinstance(self._attention, RecordableBackend) and not self._attention.is_complete

    @torch.inference_mode()
    def warm_up(self) -> bool:
        """Do the next piece of what makes steps faster: a recording, or a kernel that was built.

        To be called between two steps, the first of which may still run. Returns whether anything
        was done; not while kernels are still being built.

        Raises:
            ModelError: the layers cannot be compiled on this machine.
        """
        if self._graphs is None:
            assert isinstance(self._attention, RecordableBackend)
            return self._attention.use_all_kernels(waits=False)
        try:
            with _compiling():
                return self._graphs.record_next()
        except RuntimeError as error:
            if current().size > 1:  # a rank that launches would run steps of other sizes
                raise ModelError(
                    f"steps cannot be recorded ({first_line(error)}); try again with eager"
                ) from error
            # A layer that asks the host while it runs, as loops over experts do.
            _log.warning("steps run without CUDA graphs, which is slower: %s", error)
            self._graphs = None
            return True

    def close(self) -> None:
        """Give recorded steps up. None may be under way, and none may follow."""
        if self._graphs is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._graphs.close()
            self._graphs = None

    def holds(self, batch: Batch) -> bool:
        """Whether recorded steps have room for all sequences of a batch."""
        return self._graphs is None or self._graphs.holds(batch)

    def hot_counts(self) -> HotCounts | None:
        """What hot requests found and fetched; waits for the device. None: none can be hot."""
        return None if self._hot is None else self._hot.counts()

    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the device (from, to), before what is submitted later."""
        self._arena.copy_blocks(copies)

    def prepare(self, step: StepInput) -> None:
        """Do what a step asks for before anything is computed."""
        self.copy_blocks(step.copies)
        if step.seats is not None:
            assert self._hot is not None, "a request is hot and there is no seat"
            self._hot.tables.apply(step.seats)

    @torch.inference_mode()
    def forward(
        self,
        step: StepInput,
        previous: torch.Tensor | None = None,
        when_ready: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Start computing a step's tokens and storing their KV.

        Args:
            step: what to compute.
            previous: `[R]` tokens that the step before chose, on the model's device, where the
                host does not know them yet.
            when_ready: called once all that the step copies to the device was submitted, and
                before what it computes is.

        Returns:
            `[R + P, vocab]` logits: of the step's sampled rows, then of its scored ones. Good until
            the next call.
        """
        if self.recorder is not None:
            self.recorder.begin_step(step.num_tokens)
        self.prepare(step)
        batch = step.batch
        if batch.has_unknown:
            assert previous is not None, "a token is unknown and no step is choosing it"
            self._previous[: len(previous)].copy_(previous)
        together = step.together
        is_recorded = self._graphs is not None and not len(batch.scored_rows)
        if together is not None:
            is_recorded = is_recorded and not together.is_launched
        if is_recorded and not self.launches(batch.num_tokens):
            assert self._graphs is not None
            is_decode = batch.is_decode if together is None else together.is_decode
            logits = self._graphs.run(batch, when_ready, is_decode=is_decode)
            if logits is not None:
                return logits
        inputs, rows = copy_batch(batch, self._device)
        token_ids = inputs.resolve(self._previous) if batch.has_unknown else inputs.token_ids
        attention = self._attention.begin_step(batch, inputs)
        if self._program is not None:
            when_ready()
            return self._program.logits(batch, inputs, token_ids, attention, rows)
        if self._state_layers is None:
            when_ready()
            return self._logits(token_ids, inputs.positions, attention, rows)
        around = self._state_layers.around(attention, self._state_layers.begin_step(batch))
        when_ready()
        logits = self._logits(token_ids, inputs.positions, around, rows)
        around.finish()
        return logits

    def _logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: StepAttention,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[R, vocab]` logits of `rows` of `[T]` tokens; of all for None."""
        options = {} if rows is None or not self._selects_logits else {"logits_to_keep": rows}
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            **dict.fromkeys(self._keywords, attention),
            **self._mask,
            **options,
        )
        logits: torch.Tensor = output.logits[0]
        return logits if rows is None or self._selects_logits else logits[rows]
