"""Recording CUDA graphs, beside the steps that run meanwhile."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch


class GraphRecorder:
    """Records CUDA graphs, on a stream of its own and into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        gc.collect()  # here, as not while recording

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within it work goes to the recorder's stream.

        That waits for what was submitted before, and what comes after waits for it.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            # Also where it failed: what it has started uses the workspace of the next step.
            current.wait_stream(self._stream)

    @contextmanager
    def recording(self, graphs: list[torch.cuda.CUDAGraph]) -> Iterator[None]:
        """Within it what is submitted is recorded as the last of `graphs`, which begin here.

        An error ends the recording, so that the device can be used. Nothing is collected meanwhile,
        as what garbage gives back to the driver (pinned memory, other graphs) would break it.
        """
        torch.cuda.synchronize()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            self._begin(graphs)
            yield
        except BaseException:
            with suppress(RuntimeError):  # it is invalid, which is why it ends
                graphs[-1].capture_end()
            with suppress(RuntimeError):
                _end_capture_of_generators()
            raise
        else:
            graphs[-1].capture_end()
        finally:
            if was_enabled:
                gc.enable()

    def cut(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        """While recording: end the last of `graphs` and go on with one more."""
        graphs[-1].capture_end()
        self._begin(graphs)

    def seconds(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> float:
        """The device's time for `graphs`, one after the other; of three times the least."""
        times: list[float] = []
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for graph in graphs:
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)

    def _begin(self, graphs: list[torch.cuda.CUDAGraph]) -> None:
        graph = torch.cuda.CUDAGraph()
        graphs.append(graph)
        # Other threads may pin host memory meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")


def _end_capture_of_generators() -> None:
    """Have PyTorch's random numbers work again: a recording that failed leaves them in it."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    torch.zeros(1, device="cuda")  # PyTorch warns of a graph of nothing
    graph.capture_end()
