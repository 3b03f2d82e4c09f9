"""From options to a loaded model and the engine that runs it."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from hotset.attention.latent import hand_over_latents
from hotset.cost.expert_sizes import size_experts
from hotset.cpu_libraries import set_threads
from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.layout_choice import choose_layout
from hotset.engine.start_times import StartTimes
from hotset.errors import ConfigError
from hotset.executor.probe import check_index_dtype, check_kv_dtype, weights_bytes
from hotset.expert_options import HostedExperts
from hotset.experts.disk import ExpertSink
from hotset.experts.sizes import slot_bytes_of, why_not_hosted
from hotset.linear.fp8 import FP8
from hotset.model.devices import resolve_device
from hotset.model.loaded import LoadedModel
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.ranks.driver import Ranks
from hotset.ranks.torchrun import is_other_rank

_NUM_PHASES = 8  # at most, of a start


def load_engine(options: Options) -> tuple[Engine, LoadedModel]:
    """Load the model and set up the engine, most of its steps not yet recorded.

    Raises what either raises.
    """
    set_threads(options.runtime.threads)
    options, chosen = choose_layout(options)
    times = StartTimes.of_process(num_phases=_NUM_PHASES)
    try:
        with times.phase("load the model") as phase:
            loaded = load_on_ranks(options, _load, options)
        num_bytes = weights_bytes(loaded.model)
        phase.detail = f"{num_bytes / 1e9:.1f} GB, {num_bytes / 1e9 / phase.seconds:.1f} GB/s"
        try:
            engine = build_engine(
                options, loaded, owns_model=True, defers_recording=True, times=times
            )
        except BaseException:
            if loaded.ranks is not None:
                loaded.ranks.close(is_orderly=False)
            raise
    finally:
        times.close()
    if chosen:
        engine.report = f"{chosen}\n{engine.report}"
    engine.report += f"\n{times.report()}"
    if engine.is_warming:
        engine.report += "\n  serving while more steps are recorded, slower until then"
    return engine, loaded


def load_on_ranks(
    options: Options, load: Callable[..., LoadedModel], *arguments: Any
) -> LoadedModel:
    """Call `load`, found by its name, here and on the other ranks that options ask for.

    Raises what that raises, and what `Ranks` does; no other rank is left then.
    """
    layout = options.layout.spread
    if layout.gpus == 1:
        return load(*arguments)
    if is_other_rank(layout.gpus):
        raise ConfigError(
            "torchrun has made this process another rank than 0, which runs no engine of its own; "
            "start hotset serve, generate or batch with torchrun"
        )
    device = resolve_device(options.model.device).type
    ranks = Ranks(layout, device, step_timeout_s=options.layout.step_timeout_s)
    try:
        return replace(ranks.load(load, *arguments), ranks=ranks)
    except BaseException:
        ranks.close(is_orderly=False)
        raise


def _load(options: Options) -> LoadedModel:
    asked = options.experts
    return load_model(
        options.model.model,
        device=options.model.device,
        dtype=options.model.dtype,
        experts_on_host=isinstance(asked, HostedExperts) and not options.layout.ep,
        experts=ExpertSink(asked, read_deadline_s=options.memory.disk_read_deadline_s),
        check=functools.partial(_check_outline, options),
        needs_tokenizer=True,  # texts go in or out of all that use this
        allow_widening=options.model.allow_widening,
        activations=options.model.activations,
    )


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
