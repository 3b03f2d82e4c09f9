"""`hotset bench moe-gating`: what dynamic gating saves."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.options import Command, as_json_flag, check_writable
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from hotset.bench.gating.compare import Work

# What is not given. On a GPU: the paper's model (Huang et al.) and Qwen3-30B-A3B's decode.
_SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        **{"experts": 512, "hidden": 1024, "ffn": 4096, "layers": 24, "max_tokens": 262144},
        **{"decode_shape": (128, 2048, 768, 8), "decode_tokens": 256},
        **{"memory_gib": None, "max_s": 120.0},
    },
    "cpu": {
        **{"experts": 64, "hidden": 256, "ffn": 512, "layers": 4, "max_tokens": 1024},
        **{"decode_shape": (32, 512, 192, 8), "decode_tokens": 64},
        **{"memory_gib": 1.0, "max_s": 40.0},
    },
}
_SHRUNK = (
    "On a CPU what is not given is smaller than on a GPU: not the paper's shape "
    "(E=512, d=1024, ffn=4096, 24 layers) nor Qwen3-30B-A3B's (E=128, H=2048, I=768)."
)


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers with commas between them"
        ) from None


@click.command(cls=Command)
@click.option("--experts", type=int, help="E.  [default: 512; on a CPU 64]")
@click.option("--hidden", type=int, help="d.  [default: 1024; on a CPU 256]")
@click.option("--ffn", type=int, help="Of an expert.  [default: 4096; on a CPU 512]")
@click.option("--top-k", type=int, default=2, show_default=True, help="Experts of a token.")
@click.option(
    "--capacity",
    default="0.05,0.25,1.0",
    show_default=True,
    metavar="F,F,...",
    help="Capacity factors f of static gating: an expert gets f * batch rows.",
)
@click.option(
    "--batches",
    default="sweep",
    show_default=True,
    metavar="sweep|N,N,...",
    help="Tokens of a batch; sweep doubles from 16 until none fits.",
)
@click.option(
    "--max-tokens", type=int, help="Where the sweep ends.  [default: 262144; on a CPU 1024]"
)
@click.option(
    "--layers",
    type=int,
    help="Of the whole model, every second one MoE; 0 for none.  [default: 24; on a CPU 4]",
)
@click.option("--sequence", type=int, default=128, show_default=True, help="Its attention's.")
@click.option(
    "--decode/--no-decode",
    default=True,
    show_default=True,
    help="Compare with transformers' experts too, in decode with Qwen3-30B-A3B's layer.",
)
@click.option("--decode-tokens", type=int, help="Of that.  [default: 256; on a CPU 64]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto: bfloat16; on a CPU float32")
@click.option(
    "--memory-gib",
    type=float,
    help="A call's, beside the weights.  [default: what the device has; on a CPU 1]",
)
@click.option("--repeats", type=int, default=5, show_default=True, help="Timed calls of a batch.")
@click.option(
    "--max-s",
    type=float,
    help="Begin nothing that would end later.  [default: 120; on a CPU 40]",
)
@as_json_flag
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the JSON there, and the text beside it as .md.",
)
def command(device: str, dtype: str, as_json: bool, out: Path | None, **given: Any) -> None:
    r"""Compare dynamic gating with static gating, as in GShard, and with transformers' experts.

    For one MoE layer and for a whole model of the paper's shape (Huang et al., NeurIPS 2024), over
    growing batches until they do not fit; then decode with all experts resident.

    \b
    Example:
      hotset bench moe-gating --device cuda --out moe_gating.json
      hotset bench moe-gating --experts 64 --hidden 256 --ffn 512 --layers 0
    """
    if out is not None:
        check_writable(out)
    factors = _numbers(given["capacity"], "--capacity")
    batches = _batches(given["batches"])
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its profiler would report on itself
    from hotset.bench.gating.compare import run
    from hotset.bench.gating.report import text
    from hotset.bench.machine import describe_machine
    from hotset.cpu_libraries import bound_kernels, set_threads
    from hotset.model.devices import resolve_device

    set_threads(None)
    bound_kernels()
    target = resolve_device(device)
    if target.type == "cuda" and target.index:
        _use(target)

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    result = run(
        _work(given, factors, batches, target),
        device=target,
        dtype=_dtype(dtype, target),
        say=lambda line: click.echo(f"hotset: {line}", err=True),
        keep=keep,
    )
    result["machine"] = describe_machine()
    result["shrunk"] = None if target.type == "cuda" else _SHRUNK
    keep(result)
    if out is not None:
        out.with_suffix(".md").write_text(f"# {text(result)}\n", "utf-8")
    click.echo(json.dumps(result) if as_json else text(result))


def _batches(words: str) -> list[int] | None:
    if words == "sweep":
        return None
    sizes = _numbers(words, "--batches")
    if any(size != int(size) for size in sizes):
        raise ConfigError(f"--batches is {words!r}; expected whole numbers of tokens")
    return [int(size) for size in sizes]


def _work(
    given: dict[str, Any],
    factors: list[float],
    batches: list[int] | None,
    device: "torch.device",
) -> "Work":
    """What to compare, in the device's sizes where none are given."""
    from hotset.bench.gating.compare import Work
    from hotset.bench.gating.static import Shape

    sizes = _SIZES[device.type] | {k: value for k, value in given.items() if value is not None}
    return Work(
        shape=Shape(sizes["experts"], sizes["hidden"], sizes["ffn"], sizes["top_k"]),
        factors=factors,
        num_layers=sizes["layers"],
        sequence=sizes["sequence"],
        decode=Shape(*sizes["decode_shape"]) if sizes["decode"] else None,
        decode_tokens=sizes["decode_tokens"],
        batches=batches,
        max_tokens=sizes["max_tokens"],
        memory_gib=sizes["memory_gib"],
        repeats=sizes["repeats"],
        max_s=sizes["max_s"],
    )


def _use(device: "torch.device") -> None:
    import torch

    torch.cuda.set_device(device)


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    from hotset.model.devices import resolve_dtype

    return resolve_dtype(name, device) or torch.bfloat16
