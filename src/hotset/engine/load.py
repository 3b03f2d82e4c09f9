"""From options to a loaded model and the engine that runs it."""

import functools

from transformers import PreTrainedModel

from hotset.attention.latent import hand_over_latents
from hotset.cost.expert_sizes import size_experts
from hotset.cpu_libraries import set_threads
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.start_times import StartTimes
from hotset.executor.probe import check_index_dtype, check_kv_dtype, weights_bytes
from hotset.experts.disk import ExpertSink
from hotset.experts.sizes import slot_bytes_of, why_not_hosted
from hotset.linear.fp8 import FP8
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.option_groups import HostedExperts
from hotset.options import Options

_NUM_PHASES = 8  # at most, of a start


def load_engine(options: Options) -> tuple[Engine, LoadedModel]:
    """Load the model and set up the engine, most of its steps not yet recorded.

    Raises what either raises.
    """
    set_threads(options.runtime.threads)
    times = StartTimes.of_process(num_phases=_NUM_PHASES)
    asked = options.experts
    try:
        with times.phase("load the model") as phase:
            loaded = load_model(
                options.model.model,
                device=options.model.device,
                dtype=options.model.dtype,
                experts_on_host=isinstance(asked, HostedExperts),
                experts=ExpertSink(asked, read_deadline_s=options.memory.disk_read_deadline_s),
                check=functools.partial(_check_outline, options),
                needs_tokenizer=True,  # texts go in or out of all that use this
            )
        num_bytes = weights_bytes(loaded.model)
        phase.detail = f"{num_bytes / 1e9:.1f} GB, {num_bytes / 1e9 / phase.seconds:.1f} GB/s"
        engine = build_engine(options, loaded, owns_model=True, defers_recording=True, times=times)
    finally:
        times.close()
    engine.report += f"\n{times.report()}"
    if engine.is_warming:
        engine.report += "\n  serving while more steps are recorded, slower until then"
    return engine, loaded


def _check_outline(options: Options, outline: PreTrainedModel) -> None:
    """Refuse options that a model cannot follow, by its outline on `meta`."""
    if options.model.kv_dtype != "auto":
        hand_over_latents(outline)
        check_kv_dtype(outline, FP8)
    if options.model.index_dtype != "auto":
        check_index_dtype(outline, FP8)
    if isinstance(asked := options.experts, HostedExperts):
        slots, why_not = slot_bytes_of(outline, asked), why_not_hosted(outline)
        size_experts(asked, slots, why_not, device=options.model.device)
