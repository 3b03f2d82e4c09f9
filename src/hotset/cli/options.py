"""Options and behaviour that commands share."""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from hotset.config import EngineConfig
from hotset.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(EngineConfig)}


def _option(name: str, type_: Any, help_: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    default = _DEFAULTS[name]
    return click.option(
        f"--{name.replace('_', '-')}",
        name,
        type=type_,
        default=default,
        show_default=default is not None,
        help=help_,
    )


_ENGINE_OPTIONS: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
    _option("device", str, "auto, cpu or cuda."),
    _option(
        "dtype",
        click.Choice(["auto", "float32", "bfloat16", "float16", "fp8"]),
        "Of weights and KV; auto is float32 on the CPU, the checkpoint's own on a GPU; fp8 has "
        "8-bit weights in linear layers and bfloat16 elsewhere.",
    ),
    _option(
        "kv_dtype",
        click.Choice(["auto", "fp8"]),
        "Of stored KV; auto is the dtype above, fp8 takes half of its bytes and is not exact.",
    ),
    _option(
        "hot_gib",
        float,
        "KV memory beside the chip, in GiB; of an MoE model KV and experts together, unless "
        "--expert-slots or --expert-gib sizes those.  [default: what the weights leave]",
    ),
    _option(
        "total_gib",
        float,
        "All memory to use beside the chip, in GiB: weights, experts, KV and workspace. Instead "
        "of --hot-gib.",
    ),
    _option(
        "target",
        click.Choice(["throughput", "latency"]),
        "What the split between KV and experts is best for.",
    ),
    _option(
        "expected_users",
        int,
        "Requests at once that the split is for.  [default: --max-num-seqs; 8 for latency]",
    ),
    _option("expected_prompt_tokens", int, "Their prompts, in tokens.  [default: 1024]"),
    _option("expected_output_tokens", int, "Their answers, in tokens.  [default: 256]"),
    click.option(
        "--move-split",
        is_flag=True,
        default=_DEFAULTS["move_split"],
        help="Have the split between KV and experts follow the load while the engine runs.",
    ),
    _option("host_gib", float, "Host memory for KV, in GiB; 0 is none."),
    _option("disk_gib", float, "Disk space for KV, in GiB; 0 is none."),
    _option(
        "disk_path",
        click.Path(file_okay=False, path_type=Path),
        "Folder of the disk tier.  [default: in the platform's cache folder]",
    ),
    _option(
        "expert_slots",
        int,
        "Experts of a layer to keep beside the chip, the others in host memory.  [default: all]",
    ),
    _option("expert_gib", float, "The same by size: memory for experts beside the chip, in GiB."),
    _option(
        "expert_host_gib",
        float,
        "Host memory for experts, in GiB, the others on disk.  [default: what they take]",
    ),
    _option(
        "expert_disk_path",
        click.Path(file_okay=False, path_type=Path),
        "Folder for experts on disk.  [default: in the platform's cache folder]",
    ),
    _option(
        "expert_plan",
        click.Choice(["auto", "cache", "stream"]),
        "How other experts come: those a step needs, or all, ahead of it; auto by its tokens.",
    ),
    _option(
        "expert_cpu",
        click.Choice(["off", "auto", "on"]),
        "On a GPU, have the CPU compute experts in host memory in small steps; auto where it is "
        "faster. Rounds otherwise than the GPU.",
    ),
    _option(
        "expert_eviction",
        click.Choice(["least-stale", "lru", "lfu", "lifo"]),
        "Which expert makes room for another.",
    ),
    _option(
        "expert_cold_dtype",
        click.Choice(["auto", "fp8", "int4"]),
        "Of experts in host memory; auto is their own, the others have fewer bytes to move and are "
        "not exact.",
    ),
    _option(
        "expert_prefetch",
        int,
        "Experts of the next layer to copy while one computes, by its router's guess; 0 is none.",
    ),
    _option("block_size", int, "Tokens a KV block holds."),
    _option("max_num_seqs", int, "Most requests in one step."),
    _option("max_num_batched_tokens", int, "Most tokens in one step."),
    _option(
        "max_mixed_tokens",
        int,
        "Most tokens in a step of prompts beside decodes.  [default: 256 on a CPU, 1024 on a GPU, "
        "more there for a Mixture of Experts or with --rotation-s; in any case about what takes "
        "0.25 s]",
    ),
    _option("max_model_len", int, "Longest context in tokens.  [default: the model's own]"),
    _option(
        "rotation_s",
        float,
        "Seconds after which requests give way to those without a first token; needs a host tier."
        "  [default: first come, first served]",
    ),
    _option(
        "fetch_policy",
        click.Choice(["auto", "fetch", "recompute"]),
        "How blocks in a slower tier come back; auto decides by cost.",
    ),
    _option(
        "json_max_digits",
        int,
        "Most digits in each part of a number of structured output; 0 is no bound.",
    ),
    _option(
        "json_max_string",
        int,
        "Most characters in a string of structured output.  [default: no bound]",
    ),
    _option(
        "json_max_items", int, "Most items in an array of structured output.  [default: no bound]"
    ),
    _option(
        "json_max_depth",
        int,
        "Most levels of nesting in structured output.  [default: no bound]",
    ),
    click.option(
        "--eager",
        is_flag=True,
        default=_DEFAULTS["eager"],
        help="On a GPU, do not compile the model: slower, but starts sooner.",
    ),
    _option(
        "threads",
        int,
        "CPU threads that compute.  [default: as many as affinity and a container's quota allow]",
    ),
    click.option(
        "--prefix-caching/--no-prefix-caching",
        default=_DEFAULTS["prefix_caching"],
        show_default=True,
        help="Find known prompt beginnings instead of computing them.",
    ),
]


def engine_options(command: Callable[..., R]) -> Callable[..., R]:
    """Add `--model` and the engine's options; the command gets them as `config`."""

    @functools.wraps(command)
    def wrapper(*args: Any, **options: Any) -> R:
        chosen = {name: options.pop(name) for name in list(options) if name in _DEFAULTS}
        return command(*args, config=EngineConfig(**chosen), **options)

    wrapped: Callable[..., R] = wrapper
    for add in reversed(_ENGINE_OPTIONS):
        wrapped = add(wrapped)
    return click.option(
        "--model",
        "-m",
        help="A folder, a .gguf file or a hub id.  [default: SmolLM2-135M-Instruct]",
    )(wrapped)


def check_writable(path: Path) -> None:
    """Find out before a run of minutes that its result cannot be kept."""
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: {path.parent} is no folder one may write to")


def interruptible(command: Callable[P, R]) -> Callable[P, R]:
    """End with one line and status 130 on Ctrl-C."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        try:
            return command(*args, **options)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            # All `finally` clauses have run. A model that is still being loaded, in a thread,
            # would abort the process while Python shuts down.
            sys.stdout.flush()
            os._exit(INTERRUPTED)

    return wrapper
