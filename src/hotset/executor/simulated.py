"""What a benchmark puts in place of a model's work: selections, and contexts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hotset.attention.batch import BLOCK, OFFSET, POSITION, SOURCE, TOKEN
from hotset.attention.inputs import to_device
from hotset.attention.sparse.drawn import DrawnSelection
from hotset.attention.sparse.recorder import SelectionRecorder
from hotset.attention.sparse.rounded import store_keys
from hotset.executor.runner import ModelRunner
from hotset.executor.step_input import SampleInput, StepInput
from hotset.memory.arena import DeviceArena

_NUM_ROWS = 16381  # a prime
_LAYER_STRIDE, _POSITION_STRIDE = 977, 4001


@dataclass(frozen=True, slots=True)
class Simulated:
    """What is not done as users have it done.

    Attributes:
        selection: replaces what indexers score; None keeps it.
        places_prompts: whether prompts are not computed: random rows are put in their place, as a
            decode instance gets those of another.
        recorder: notes what decodes select; None notes nothing.
    """

    selection: DrawnSelection | None = None
    places_prompts: bool = False
    recorder: SelectionRecorder | None = None


class PlacingRunner(ModelRunner):
    """Computes decodes as ever, and puts random rows where those of prompts go.

    A row follows from token, position and layer, so that it is the same in each run. The token
    after a prompt is drawn from logits of zero. Scheduling, blocks and copies between tiers know no
    difference.
    """

    def __init__(self, model: Any, arena: DeviceArena, *args: Any, **options: Any) -> None:
        super().__init__(model, arena, *args, **options)
        self._vocab_size: int = model.config.get_text_config().vocab_size
        generator = torch.Generator(arena.storage.device).manual_seed(0)
        widths = [part.shape[-1] for part in (*arena.layers, *arena.index_keys)]
        self._rows = torch.randn(
            _NUM_ROWS, max(widths), generator=generator, device=arena.storage.device
        ).to(arena.storage.dtype)

    def record(self, *, max_num_tokens: int, **options: Any) -> None:
        """See `ModelRunner`: no step has more tokens than decodes."""
        super().record(max_num_tokens=min(max_num_tokens, len(self._previous)), **options)

    @torch.inference_mode()
    def forward(
        self,
        step: StepInput,
        previous: torch.Tensor | None = None,
        when_ready: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """See `ModelRunner`; logits of prompts are zeros."""
        batch = step.batch
        num_decodes = batch.num_decodes
        if num_decodes == batch.num_tokens:
            return super().forward(step, previous, when_ready)
        assert not len(batch.scored_rows), "no prompt is computed, and so none has probabilities"
        is_decode = batch.sampled_rows < num_decodes
        size = len(batch.sampled_rows), self._vocab_size
        if num_decodes:
            rows = batch.sampled_rows[is_decode]
            inputs = np.ascontiguousarray(batch.inputs[:, :num_decodes])
            decodes = replace(
                batch,
                inputs=inputs,
                sampled_rows=rows,
                sequences=batch.sequences[:num_decodes],
                has_unknown=bool((inputs[SOURCE] >= 0).any()),
            )
            kinds = step.kinds[:num_decodes]
            alone = replace(step, kinds=kinds, batch=decodes, sample=SampleInput())
            computed = super().forward(alone, previous, when_ready)
            logits = computed.new_zeros(size)
            logits[to_device(np.flatnonzero(is_decode), self.device)] = computed
        else:
            self.prepare(step)
            logits = torch.zeros(size, dtype=self._model.dtype, device=self.device)
            when_ready()
        self._place(np.ascontiguousarray(batch.inputs[:, num_decodes:]))
        return logits

    def _place(self, inputs: np.ndarray[Any, Any]) -> None:
        """Write the rows of all layers for these tokens, `[6, T]`."""
        tokens = to_device(inputs, self.device)
        blocks, offsets = tokens[BLOCK], tokens[OFFSET]
        first = tokens[TOKEN] + _POSITION_STRIDE * tokens[POSITION]
        arena = self._arena
        scales = [*[None] * len(arena.layers), *arena.index_scales]
        for number, part in enumerate((*arena.layers, *arena.index_keys)):
            if width := part.shape[-1]:
                rows = self._rows[(first + _LAYER_STRIDE * number) % _NUM_ROWS, :width]
                if (of_part := scales[number]) is None:
                    part[blocks, offsets] = rows
                else:
                    store_keys(rows, part, of_part, (blocks, offsets))
