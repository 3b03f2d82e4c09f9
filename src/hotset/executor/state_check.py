"""Whether a model's state is all in its slots: what was seen, and what a trial shows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

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
from hotset.attention.spec import LayerAttention
from hotset.attention.state_step import StateLayers
from hotset.cost.cache_spec import State
from hotset.errors import ModelError
from hotset.experts.gating import without_experts
from hotset.memory.arena import DeviceArena
from hotset.memory.state_arena import StateArena
from hotset.parallel.group import alone
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
    """Raise ModelError where a layer computes otherwise of a text in two steps, beside another.

    That finds a state that is not in the slots. Each layer is given what came to it where the text
    was one step, so that rounding does not add up over layers. Experts are left out.

    Args:
        model: on its device, with weights.
        layers: that attend.
        kv_layers: index of a layer that attends -> which of `layers` it is.
        states: what layers keep beside keys and values, by their index.
    """
    trial = _Trial(model, layers, kv_layers, states)
    whole = trial.run([(0, _TEXT, 0, len(_TEXT))])
    if len(whole) < len(states):
        raise ModelError(
            f"{type(model).__name__} keeps states outside of layers of transformers' own kind "
            "(GradientCheckpointingLayer), where they cannot be tried: not supported"
        )
    other = trial.run([(1, _OTHER, 0, len(_OTHER))])
    for cut in (
        ((0, len(_OTHER) - 1), (0, _CUT)),
        ((len(_OTHER) - 1, len(_OTHER)), (_CUT, len(_TEXT))),
    ):
        rows = [slice(*part) for part in cut]
        expected = [
            _Computed(
                *(torch.cat([one[rows[0]], two[rows[1]]]) for one, two in zip(*each, strict=True))
            )
            for each in zip(other, whole, strict=True)
        ]
        parts = [(1, _OTHER, *cut[0]), (0, _TEXT, *cut[1])]
        got = trial.run(parts, [each.given for each in expected])
        if not all(map(_changed_alike, expected, got)):
            raise ModelError(
                f"{type(model).__name__} answers otherwise where a text is cut: it keeps a state "
                "in a way that is not known, not supported"
            )


class _Computed(NamedTuple):
    """What came to a layer and what it made of it, `[T, hidden]` each."""

    given: torch.Tensor
    made: torch.Tensor


def _changed_alike(one: _Computed, other: _Computed) -> bool:
    """Whether a layer added the same to what it was given, but for rounding.

    Of what it adds, and of the sum, whose last bits are lost where it is much larger.
    """
    eps = torch.finfo(one.made.dtype).eps
    added = one.made.float() - one.given.float()
    bound = eps**0.5 * added.abs().max() + 2 * eps * one.made.float().abs().max()
    return bool((one.made.float() - other.made.float()).abs().max() <= bound)


@contextmanager
def _noting_layers(
    model: PreTrainedModel, given: Sequence[torch.Tensor] | None
) -> Iterator[list[_Computed]]:
    """Within it what each layer computes is noted, of `given` where there is any."""
    noted: list[_Computed] = []
    came: list[torch.Tensor] = []

    def before(_: nn.Module, args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else keywords["hidden_states"]
        if given is not None:
            hidden = given[len(noted)].unsqueeze(0)
        came.append(hidden[0])
        if args:
            return (hidden, *args[1:]), keywords
        return args, keywords | {"hidden_states": hidden}

    def after(_: nn.Module, args: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        noted.append(_Computed(came.pop(), made[0]))

    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    hooks = [
        hook
        for layer in layers
        for hook in (
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        )
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


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
    def run(
        self,
        parts: Sequence[tuple[int, Sequence[int], int, int]],
        given: Sequence[torch.Tensor] | None = None,
    ) -> list[_Computed]:
        """One step of a (sequence, text, start, end) each; what each layer computes of `given`."""
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
        with alone(), without_experts(self._model), _noting_layers(self._model, given) as noted:
            self._model(
                input_ids=inputs.token_ids.unsqueeze(0),
                position_ids=inputs.positions.unsqueeze(0),
                use_cache=False,
                **dict.fromkeys(step_keywords(self._model), step),
            )
        return noted
