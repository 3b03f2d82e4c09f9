"""`hotset bench moe-gating`: what dynamic gating saves."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.options import interruptible
from hotset.errors import ConfigError

if TYPE_CHECKING:
    import torch

_MAX_S = {"cuda": 120.0, "cpu": 40.0}


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; expected numbers with commas between them"
        ) from None


@click.command()
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the JSON there, and the text beside it as .md.",
)
@interruptible
def command(
    experts: int | None,
    hidden: int | None,
    ffn: int | None,
    top_k: int,
    capacity: str,
    batches: str,
    max_tokens: int | None,
    layers: int | None,
    sequence: int,
    decode: bool,
    decode_tokens: int | None,
    device: str,
    dtype: str,
    memory_gib: float | None,
    repeats: int,
    max_s: float | None,
    as_json: bool,
    out: Path | None,
) -> None:
    r"""Compare dynamic gating with static gating, as in GShard, and with transformers' experts.

    For one MoE layer and for a whole model of the paper's shape (Huang et al., NeurIPS 2024), over
    growing batches until they do not fit; then decode with all experts resident.

    \b
    Example:
      hotset bench moe-gating --device cuda --out moe_gating.json
      hotset bench moe-gating --experts 64 --hidden 256 --ffn 512 --layers 0
    """
    if out is not None and not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ConfigError(f"{out} cannot be written: {out.parent} is no folder one may write to")
    factors = _numbers(capacity, "--capacity")
    sizes = None if batches == "sweep" else _numbers(batches, "--batches")
    if sizes is not None and any(size != int(size) for size in sizes):
        raise ConfigError(f"--batches is {batches!r}; expected whole numbers of tokens")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its profiler would report on itself
    from hotset.bench.machine import describe_machine
    from hotset.bench.moe_compare import Work, run
    from hotset.bench.moe_gating import Shape
    from hotset.bench.moe_report import text
    from hotset.cpu_libraries import bound_kernels, set_threads
    from hotset.model.devices import resolve_device

    set_threads(None)
    bound_kernels()
    target = resolve_device(device)
    on_gpu = target.type == "cuda"
    if on_gpu and target.index:
        _use(target)
    shape = Shape(
        experts if experts is not None else (512 if on_gpu else 64),
        hidden if hidden is not None else (1024 if on_gpu else 256),
        ffn if ffn is not None else (4096 if on_gpu else 512),
        top_k,
    )
    work = Work(
        shape=shape,
        factors=factors,
        num_layers=layers if layers is not None else (24 if on_gpu else 4),
        sequence=sequence,
        decode=(Shape(128, 2048, 768, 8) if on_gpu else Shape(32, 512, 192, 8)) if decode else None,
        decode_tokens=decode_tokens if decode_tokens is not None else (256 if on_gpu else 64),
        batches=None if sizes is None else [int(size) for size in sizes],
        max_tokens=max_tokens if max_tokens is not None else (262144 if on_gpu else 1024),
        memory_gib=1.0 if memory_gib is None and not on_gpu else memory_gib,
        repeats=repeats,
        max_s=max_s if max_s is not None else _MAX_S[target.type],
    )

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")

    result = run(
        work,
        device=target,
        dtype=_dtype(dtype, target),
        say=lambda line: click.echo(f"hotset: {line}", err=True),
        keep=keep,
    )
    result["machine"] = describe_machine()
    result["shrunk"] = (
        None
        if on_gpu
        else "On a CPU what is not given is smaller than on a GPU: not the paper's shape "
        "(E=512, d=1024, ffn=4096, 24 layers) nor Qwen3-30B-A3B's (E=128, H=2048, I=768)."
    )
    keep(result)
    if out is not None:
        out.with_suffix(".md").write_text(f"# {text(result)}\n", "utf-8")
    click.echo(json.dumps(result) if as_json else text(result))


def _use(device: "torch.device") -> None:
    import torch

    torch.cuda.set_device(device)


def _dtype(name: str, device: "torch.device") -> "torch.dtype":
    import torch

    from hotset.model.devices import resolve_dtype

    return resolve_dtype(name, device) or torch.bfloat16
