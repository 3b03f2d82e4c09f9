"""Whether a model's state is all in its slots: what was seen, and what a trial shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hotset.attention.batch import (
    NUM_INPUTS,
    OFFSET,
    POSITION,
    SEAT,
    SOURCE,
    TOKEN,
    Batch,
    SequenceSpan,
)
from hotset.attention.gather import GatherBackend
from hotset.attention.inputs import copy_batch
from hotset.attention.mixers import mixers, step_keywords
from hotset.attention.probe import are_alike
from hotset.attention.spec import LayerAttention
from hotset.attention.state_step import StateLayers
from hotset.cost.cache_spec import State
from hotset.errors import ModelError
from hotset.experts.gating import without_experts
from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena
from hotset.sequence import PADDING_SLOT, ZEROS_SLOT

# Types of layers that keep a state, and of those that do not attend.
STATE_TYPES = {"linear_attention", "conv", "hybrid"}
NOT_ATTENDING = {"linear_attention", "conv", "mlp", "moe"}

# The trial: two texts, of which the first is cut after its fifth token.
_TEXT, _OTHER = (5, 9, 2, 7, 3, 8, 1, 6), (4, 6, 1)
_CUT = 5


def check_layers(
    model: PreTrainedModel, attending: Sequence[int], states: Mapping[int, State]
) -> None:
    """Raise ModelError where a layer did not ask for what its type says, or keeps another state.

    Args:
        model: whose layers were seen in a probe.
        attending: indices of those that attended.
        states: what layers keep beside keys and values, by their index.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    num_layers = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    types = dict(enumerate(layer_types[:num_layers]))
    lost = [
        i
        for i, kind in types.items()
        if kind in STATE_TYPES and (i not in states or (kind != "conv" and not states[i].recurrent))
    ]
    if lost:
        raise ModelError(
            f"{name} has layers of type {types[lost[0]]} that keep a state in a way that is not "
            f"known (first: layer {lost[0]}): not supported"
        )
    missing = [i for i, kind in types.items() if kind not in NOT_ATTENDING and i not in attending]
    if missing or not set(attending) <= set(types):
        raise ModelError(
            f"{name}: {len(missing)} of {num_layers} layers (first: layer {missing[:1]}) do not "
            "use transformers' attention interface, so their state cannot be paged"
        )
    for mixer in mixers(model.get_decoder()):
        if getattr(mixer, "layer_idx", None) not in states:
            raise ModelError(
                f"{name} convolves over tokens in {type(mixer).__name__}, whose state is kept in a "
                "way that is not known: not supported"
            )


def check_states(
    model: PreTrainedModel,
    layers: Sequence[LayerAttention],
    kv_layers: dict[int, int],
    states: Mapping[int, State],
) -> None:
    """Raise ModelError where a text in two steps, beside another, has other logits than in one.

    That finds a state that is not in the slots. Experts are left out.

    Args:
        model: on its device, with weights.
        layers: that attend.
        kv_layers: index of a layer that attends -> which of `layers` it is.
        states: what layers keep beside keys and values, by their index.
    """
    trial = _Trial(model, layers, kv_layers, states)
    whole = trial.run([(0, _TEXT, 0, len(_TEXT))])[0]
    other = trial.run([(1, _OTHER, 0, len(_OTHER))])[0]
    trial.run([(1, _OTHER, 0, len(_OTHER) - 1), (0, _TEXT, 0, _CUT)])
    ends = trial.run([(1, _OTHER, len(_OTHER) - 1, len(_OTHER)), (0, _TEXT, _CUT, len(_TEXT))])
    if not (are_alike(ends[0], other) and are_alike(ends[1], whole)):
        raise ModelError(
            f"{type(model).__name__} answers otherwise where a text is cut: it keeps a state in a "
            "way that is not known, not supported"
        )


class _Trial:
    """Two sequences over memory of their own."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerAttention],
        kv_layers: dict[int, int],
        states: Mapping[int, State],
    ) -> None:
        self._model = model
        self._arena = DeviceArena(
            [layer.cache.stored for layer in layers],
            num_blocks=2,
            block_size=len(_TEXT),
            dtype=model.dtype,
            device=model.device,
        )
        self._attention = GatherBackend(self._arena, layers)
        arena = StateArena(
            states, num_slots=PADDING_SLOT + 3, dtype=model.dtype, device=model.device
        )
        self._states = StateLayers(arena, kv_layers, model.device)

    @torch.inference_mode()
    def run(self, parts: Sequence[tuple[int, Sequence[int], int, int]]) -> list[torch.Tensor]:
        """One step of a (sequence, text, start, end) each; the last logits of each."""
        spans: list[SequenceSpan] = []
        columns: list[np.ndarray[Any, Any]] = []
        row = 0
        for sequence, text, start, end in parts:
            slot = PADDING_SLOT + 1 + sequence
            read = slot if start else ZEROS_SLOT
            spans.append(SequenceSpan(row, end - start, end, [sequence], read, slot))
            rows = np.full((NUM_INPUTS, end - start), sequence, np.int64)
            rows[TOKEN] = text[start:end]
            rows[POSITION] = rows[OFFSET] = range(start, end)
            rows[SOURCE] = rows[SEAT] = -1
            columns.append(rows)
            row += end - start
        num_decodes = sum(span.num_tokens == 1 for span in spans)
        none = np.empty(0, np.int64)
        batch = Batch(np.concatenate(columns, axis=1), none, none, spans, num_decodes, False)
        inputs, _ = copy_batch(batch, self._model.device)
        attention = self._attention.begin_step(batch, inputs)
        step = self._states.around(attention, self._states.begin_step(batch))
        with without_experts(self._model):
            output = self._model(
                input_ids=inputs.token_ids.unsqueeze(0),
                position_ids=inputs.positions.unsqueeze(0),
                use_cache=False,
                **dict.fromkeys(step_keywords(self._model), step),
            )
        return [output.logits[0, span.start + span.num_tokens - 1] for span in spans]
