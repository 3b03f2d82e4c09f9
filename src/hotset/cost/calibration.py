"""What engines reach of nominal rates."""

from dataclasses import dataclass

from hotset.cost.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Calibration:
    """What real engines reach of nominal rates, and what a step costs beside them.

    The first three are fitted by `benchmarks/planner_validation.py` on two published rows (see
    `docs/planner.md`); the others are taken from measurements or papers and never fitted.

    Attributes:
        memory_efficiency: share of the nominal HBM rate that decode kernels reach.
        kernel_s: time each kernel of a graph costs beside its bytes: launch, ramp and tail.
        latent_kernels: kernels of a layer over latents that engines which fuse more do not have.
        user_s: time a step spends on each sequence: sampling, scheduling, answering.
        host_is_hidden: whether a step's time per sequence runs beside the device, so that a step
            takes the longer of both.
        has_whole_embedding: whether each tensor-parallel rank holds all input embeddings.
        reading_is_hidden: whether dense products take the longer of reading their weights and
            computing; otherwise the root of the sum of both squares, as rows of a product cost time
            before compute bounds it.
        compute_efficiency: share of nominal dense operations that large products reach.
        attention_efficiency: the same for attention of prefill and of MLA.
        index_efficiency: the same for scoring an indexer's keys, as assumed: 350 of 989 TFLOP/s.
        link_efficiency: share of the nominal host-link rate; 55.4 of 64 GB/s on an H200.
        gather_efficiency: share of the rate of copies that a GPU reaches where its kernels read
            pinned memory themselves: 51.0 of 54.6 GB/s on an H200, with experts of 9.4 MB.
        gather_rows_per_s: rows that such kernels reach, however short, in a pool of 40 GiB of
            4-KiB pages: address translation bounds them. Measured on an H200, see
            `benchmarks/gather_rows.py`.
        wire_efficiency: share of the nominal NVLink or network rate.
        all_reduce_s: latency of one all-reduce, all-gather or reduce-scatter inside an NVLink
            domain, where the profile has no times of them.
        all_to_all_s: latency of one dispatch or combine.
        hop_s: added to either beyond the domain.
        probe_memory: share of the *measured* HBM rate, for profiles of `hotset probe`.
        probe_compute: the same for operations.
        band: relative error of one engine against another; the honest width of a prediction.
    """

    memory_efficiency: float = 0.86
    kernel_s: float = 4.45e-6
    latent_kernels: int = 0
    user_s: float = 21.8e-6
    host_is_hidden: bool = False
    has_whole_embedding: bool = False
    reading_is_hidden: bool = True
    compute_efficiency: float = 0.6
    attention_efficiency: float = 0.6
    index_efficiency: float = 350 / 989
    link_efficiency: float = 0.86
    gather_efficiency: float = 51.0 / 54.6
    gather_rows_per_s: float = 36e6
    wire_efficiency: float = 0.86
    all_reduce_s: float = 10e-6
    all_to_all_s: float = 30e-6
    hop_s: float = 20e-6
    probe_memory: float = 0.97
    probe_compute: float = 0.74
    band: float = 0.2

    def memory_bytes_per_s(self, hardware: Hardware) -> float:
        """HBM rate that decode kernels reach."""
        reached = self.probe_memory if hardware.measured else self.memory_efficiency
        return hardware.hbm_bytes_per_s * reached

    def link_bytes_per_s(self, hardware: Hardware, *, num_gpus: int = 1) -> float:
        """One-way rate from host memory to one of `num_gpus` GPUs of a host that all use theirs.

        The least of its share of the link and what all were measured to reach together; where they
        were not, its share of what the host's memory delivers.
        """
        link = hardware.host_link_bytes_per_s / min(hardware.gpus_per_host_link, num_gpus)
        reached = 1.0 if hardware.measured else self.link_efficiency
        measured = hardware.together.get(num_gpus)
        shared = measured.link_bytes_per_s if measured else None
        return min(link * reached, shared or hardware.host_memory_bytes_per_s / num_gpus)


# By engine. The kernels over latents and the time per sequence of hotset are fitted on steps that
# were measured on an H200, of the shortest contexts; the other steps are scored.
CALIBRATIONS = {
    "published": Calibration(),
    "hotset": Calibration(
        latent_kernels=6,
        user_s=12.3e-6,
        host_is_hidden=True,
        has_whole_embedding=True,
        reading_is_hidden=False,
    ),
}
