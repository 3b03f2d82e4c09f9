"""Experts of which some are on the device and all in host memory, or on disk below it.

A step brings them in one of two ways, chosen by its number of tokens. *cache*: the experts that it
needs and that have no slot are copied into one. *stream*: all experts of a layer that have no slot
come through one of two staging buffers while the layer before computes, and the slots keep what
they hold. Output does not depend on the way, on what is resident or on the evictions. Source of
expert buffering: Huang et al., "Toward Efficient Inference for Mixture of Experts", NeurIPS 2024.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hotset.cost.slot_bytes import SlotBytes
from hotset.experts.cpu import ColdExperts, ColdLayer, device_seconds
from hotset.experts.disk import DiskExperts
from hotset.experts.host import HostExperts, HostRows
from hotset.experts.layer import LayerBuffer
from hotset.experts.narrow import relative_rms
from hotset.experts.prefetch import Prefetch
from hotset.experts.staging import Staging
from hotset.experts.store import ExpertStore, StoreCounts
from hotset.metrics import ExpertCounts


class ExpertBuffer:
    """The buffers of all layers of a model; attached to them until `close`.

    Args:
        layers: the buffer of each, whose experts are hosted.
        sizes: of slots.
        counts: `[L, 6]` int64 on the device, that the layers count in.
        staging: that they share; None where no step streams.
        prefetch: likewise; None where nothing is copied ahead.
        memory: see below.

    Attributes:
        layers: see above, like sizes.
        memory: `[region.num_bytes]` uint8 on the device, which slots share with KV; None where they
            have their own. Packed slots always do: there only numbers move.
        host_bytes: of the only copy in host memory; or, with experts on disk, of all that is there.
        store: of experts on disk; None where all are in host memory.
        narrow: how host memory has them in fewer bits; None where it does not.
        rounding_error: relative root mean square error of the weights of all experts, where host
            memory has them in fewer bits; else 0.
    """

    def __init__(
        self,
        layers: list[LayerBuffer],
        sizes: SlotBytes,
        counts: torch.Tensor,
        *,
        staging: Staging | None,
        prefetch: Prefetch | None,
        memory: torch.Tensor | None,
    ) -> None:
        self.layers, self.sizes, self.memory = layers, sizes, memory
        self.device = counts.device
        self._counts = counts
        self._staging, self._prefetch = staging, prefetch
        self._cold: ColdExperts | None = None
        sources = [layer.source for layer in layers]
        self.narrow = sources[0].narrow
        self.store: ExpertStore | None = None
        if isinstance(sources[0], DiskExperts):
            self.store = sources[0].store
        # That of experts on disk is shared by all layers.
        self._rows: list[HostRows] = list({id(s.rows): s.rows for s in sources}.values())
        self.host_bytes = sum(rows.num_bytes for rows in self._rows)
        in_memory = [source for source in sources if isinstance(source, HostExperts)]
        self.rounding_error = relative_rms(source.rounding for source in in_memory)
        for layer in layers:
            assert layer.experts.hosted is not None
            layer.experts.hosted.buffer = layer

    def counts(self) -> ExpertCounts:
        """What the buffers did so far; waits for the device."""
        hits, misses, predicted, right, ahead, streamed = self._counts.sum(0).tolist()
        moved = (misses + ahead + streamed) * self.layers[0].source.payload_bytes
        computed = self._cold.num_computed if self._cold is not None else 0
        disk = StoreCounts() if self.store is None else self.store.counts()
        return ExpertCounts(
            *(hits, misses, moved, predicted, right, ahead, computed),
            *(disk.reads, disk.read_bytes, disk.wait_s),
        )

    @property
    def num_slots(self) -> int:
        """Slots in use in each layer."""
        return self.layers[0].table.num_active

    @property
    def device_bytes(self) -> int:
        """Of slots in use and staging buffers."""
        return self.sizes(self.num_slots)

    @torch.inference_mode()
    def resize(self, num_slots: int) -> None:
        """Change the number of slots in use of each layer: to fewer, or to one more.

        To be called between two steps, and it does not wait: memory of slots that are given up is
        free for what is submitted later.
        """
        self.join()  # what a step that failed may have left behind
        for layer in self.layers:
            layer.resize(num_slots)

    def reset_counts(self) -> None:
        """Count from zero."""
        self._counts.zero_()
        if self._cold is not None:
            self._cold.num_computed = 0
        if self.store is not None:
            self.store.reset_counts()

    def join(self) -> None:
        """Have what is computed from here on wait for the copies started so far."""
        if self._staging is not None:
            self._staging.join()
        if self._prefetch is not None:
            self._prefetch.join()

    def compute_cold_on_cpu(self, mode: str, *, threads: int | None = None) -> str:
        """Have the CPU compute experts that are not on the GPU, in steps of few tokens.

        To be called when the model has run. Steps are recorded before, or within
        `while_recording`.

        Args:
            mode: see `ColdExperts`.
            threads: of the CPU, with the one that launches; None is one for each CPU.

        Returns:
            What to say of it at start.
        """
        device, first = self.device, self.layers[0]
        host = first.source
        assert isinstance(host, HostExperts)
        hidden_size = host.layout.up[0 if host.layout.is_transposed else 1]
        cold = ColdExperts(
            hidden_size,
            first.top_k,
            host.layout.dtype,
            num_experts=first.table.num_experts,
            num_slots=first.table.num_slots,
            is_pinned=device.type == "cuda",
            mode=mode,
            num_threads=None if threads is None else max(1, threads - 1),
        )
        self.attach_cold(cold)
        assert first.cold is not None
        at = torch.empty_like(host.payloads[0], device=device)  # in few bits, if those are

        def copy(count: int) -> None:
            for payload in host.payloads[:count]:
                at.copy_(payload, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        cold.measure(first.cold, copy, device_seconds(device))
        return cold.describe()

    def attach_cold(self, cold: ColdExperts) -> None:
        """Let `cold` take part in the steps of all layers."""
        self._cold = cold
        can_copy = self.sizes.plan != "stream"  # which keeps what is in slots
        for layer in self.layers:
            layer.cold = ColdLayer(cold, layer.table, layer.experts, can_copy=can_copy)

    @contextmanager
    def while_recording(self) -> Iterator[None]:
        """Within it steps may be recorded beside those of requests.

        The CPU computes no experts, as a recorded step decides without the host, and what is tried
        counts as nothing.
        """
        counted = self._counts.clone()
        if self._cold is not None:
            self._cold.is_paused = True
        try:
            yield
        finally:
            self._counts.copy_(counted)
            if self._cold is not None:
                self._cold.is_paused = False

    def launches(self, num_tokens: int) -> bool:
        """Whether the host takes part in steps of `num_tokens` tokens, so that none is replayed."""
        return self._cold is not None and self._cold.takes(num_tokens)

    @property
    def can_be_recorded(self) -> bool:
        """Whether the device decides alone, so that a CUDA graph can hold a step."""
        return self.store is None

    def take_faults(self) -> Counter[str]:
        """What went wrong on disk since the last call, by kind."""
        if self.store is None:
            return Counter()
        faults = Counter(self.store.faults)
        self.store.faults.clear()
        return faults

    def close(self, *, with_disk: bool = False) -> None:
        """Unpin the host copy and leave the layers. No step may be under way, and none may follow.

        Args:
            with_disk: remove the file of experts on disk; the model can never run again then.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for rows in self._rows:
            rows.unpin()
        for layer in self.layers:
            hosted = layer.experts.hosted
            if hosted is not None and hosted.buffer is layer:  # another engine may have its own
                hosted.buffer = None  # nor does it keep memory that KV shares
        if self._cold is not None:
            self._cold.close()
        if with_disk and self.store is not None:
            self.store.close()
