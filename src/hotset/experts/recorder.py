"""Which experts the tokens of real steps went to.

Counting is done on the device, by operations of fixed shape, so that a CUDA graph can record them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from hotset.errors import ConfigError
from hotset.experts.gating import gated_layers

FORMATS = (".npz", ".json")
_STEPS_AT_ONCE = 256  # steps on the device before their counts go to the host


class LayerCounts:
    """Where the tokens of a step are counted for one layer.

    Attributes:
        counts: `[E + 1]` int64; the last is for what does not count.
        num_tokens: `[]` int64, of the step; a recorded graph pads a step with others behind them.
    """

    def __init__(self, counts: torch.Tensor, num_tokens: torch.Tensor) -> None:
        self.counts = counts
        self.num_tokens = num_tokens

    def add(self, top_k_index: torch.Tensor) -> None:
        """Count `[T, K]` expert ids; those of E and more are another rank's."""
        beyond = len(self.counts) - 1
        places = torch.arange(len(top_k_index), device=top_k_index.device)
        is_padding = (places >= self.num_tokens).unsqueeze(-1)
        ids = top_k_index.long().clamp(max=beyond).masked_fill(is_padding, beyond).reshape(-1)
        self.counts.scatter_add_(0, ids, torch.ones_like(ids))


class RoutingRecorder:
    """Counts tokens by step, layer and expert, while it is attached to a model.

    Attach it before an engine compiles the model or records its steps, and detach it when done.

    Raises:
        ConfigError: the model has no experts that dynamic gating computes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = gated_layers(model)
        if not self._layers:
            raise ConfigError(
                "routing cannot be recorded: the model has no experts that dynamic gating computes"
            )
        sizes = {experts.num_experts for experts in self._layers}
        if len(sizes) != 1:
            raise ConfigError("routing cannot be recorded: layers differ in their experts")
        self.num_experts: int = sizes.pop()
        names = {id(module): name for name, module in model.named_modules()}
        self.layer_names = [names[id(experts.module)] for experts in self._layers]
        device = model.device
        shape = (len(self._layers), self.num_experts + 1)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._num_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self._recent = torch.zeros(
            (_STEPS_AT_ONCE, len(self._layers), self.num_experts), dtype=torch.int32, device=device
        )
        self._num_recent = 0
        self._is_open = False
        self._past: list[npt.NDArray[np.int32]] = []
        self.step_tokens: list[int] = []
        for experts, counts in zip(self._layers, self._counts, strict=True):
            experts.counts = LayerCounts(counts, self._num_tokens)

    def detach(self) -> None:
        """Count no more. What was compiled or recorded goes on counting, unread."""
        for experts in self._layers:
            experts.counts = None

    @torch.inference_mode()
    def begin_step(self, num_tokens: int) -> None:
        """End the step before and count from here on, `num_tokens` tokens of each layer."""
        self._end_step()
        self._counts.zero_()
        self._num_tokens.fill_(num_tokens)
        self.step_tokens.append(num_tokens)
        self._is_open = True

    @torch.inference_mode()
    def history(self) -> npt.NDArray[np.int32]:
        """`[steps, layers, experts]` tokens of the steps begun so far; ends the last."""
        self._end_step()
        self._flush()
        empty = np.zeros((0, *self._recent.shape[1:]), np.int32)
        return np.concatenate([empty, *self._past])

    def _end_step(self) -> None:
        if not self._is_open:
            return
        self._recent[self._num_recent].copy_(self._counts[:, :-1])
        self._num_recent += 1
        self._is_open = False
        if self._num_recent == _STEPS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._past.append(self._recent[: self._num_recent].cpu().numpy().copy())
        self._num_recent = 0


def write_routing(path: Path, recorder: RoutingRecorder, about: dict[str, Any]) -> int:
    """Write what was recorded as `.npz` or `.json`; returns the number of steps.

    Both hold `history [steps, layers, experts]`, tokens; `co_activation [layers, experts,
    experts]`, in how many steps both experts got tokens; `step_tokens [steps]`; `layers`, their
    names; and `about`.

    Raises:
        ConfigError: no step was recorded, or the file cannot be written.
    """
    history = recorder.history()
    if not len(history):
        raise ConfigError("no step was recorded")
    used = (history > 0).astype(np.float32)
    together = np.einsum("sle,slf->lef", used, used).astype(np.int32)
    try:
        if path.suffix == ".json":
            data = {
                "about": about,
                "layers": recorder.layer_names,
                "step_tokens": recorder.step_tokens,
                "history": history.tolist(),
                "co_activation": together.tolist(),
            }
            path.write_text(json.dumps(data) + "\n", "utf-8")
        else:
            with path.open("wb") as file:
                np.savez_compressed(
                    file,
                    history=history,
                    co_activation=together,
                    step_tokens=np.array(recorder.step_tokens, np.int64),
                    layers=np.array(recorder.layer_names),
                    about=np.array(json.dumps(about)),
                )
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return len(history)
