"""What goes on where a kernel or a recording fails while requests are served."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hotset.attention.flashinfer.backend import FlashInferBackend
from hotset.attention.flashinfer.wrappers import Wrappers
from hotset.errors import ModelError
from hotset.executor.graphs import StepGraphs
from hotset.executor.recorded_sizes import RecordedSteps
from hotset.executor.recording import GraphRecorder


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FlashInferBackend:
    """One with the kernels for any GPU, where those for Hopper cannot be built."""
    made = object.__new__(FlashInferBackend)
    made.is_complete, made._kernels, made._can_use_hopper = False, None, True
    made._widened, made._prefill, made._prefill_widened = None, {}, None

    def fail() -> None:
        raise ModelError("no compiler")

    monkeypatch.setattr(made, "wait_for_plan", lambda: None)
    monkeypatch.setattr(made, "_make_widened", lambda: "a copy in 16 bits")
    made.make = SimpleNamespace(prompts=lambda *names: Wrappers({}))  # type: ignore[assignment]
    monkeypatch.setattr(made, "_takes_hopper_kernel", lambda dtype: True)
    monkeypatch.setattr(made, "_load", fail)
    made.arena = SimpleNamespace(storage=torch.zeros(0))  # type: ignore[assignment]
    return made


def test_a_kernel_that_cannot_be_built_later_costs_no_request(
    backend: FlashInferBackend, caplog: pytest.LogCaptureFixture
) -> None:
    assert backend.can_record_prompts
    assert backend.use_all_kernels(waits=False)
    assert backend.is_complete and not backend.can_record_prompts
    assert (backend._prefill, backend._prefill_widened, backend.widens) == ({}, None, False)
    assert "prompts stay with the kernel for any GPU, which is slower: no compiler" in caplog.text


def test_a_kernel_that_cannot_be_built_at_start_is_refused(backend: FlashInferBackend) -> None:
    with pytest.raises(ModelError, match="no compiler"):
        backend.use_all_kernels(waits=True)


def test_the_next_step_waits_for_what_a_failed_recording_has_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[tuple[str, str]] = []

    def stream(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: waited.append((name, other.name))
        )

    def fail(size: int) -> None:
        raise torch.OutOfMemoryError("no room for the step")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream("steps"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    graphs = object.__new__(StepGraphs)
    graphs._recorder = object.__new__(GraphRecorder)
    graphs._recorder._stream = stream("recording")  # type: ignore[assignment]
    graphs._steps = RecordedSteps((1,), (1,), most_seqs=1, most_tokens=1)
    monkeypatch.setattr(graphs, "_record_decode", fail)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.record_next()
    assert waited == [("recording", "steps"), ("steps", "recording")]
