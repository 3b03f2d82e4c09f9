"""`hotset bench moe-gating`: what dynamic gating saves."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.bench.gating.work import ON_A_CPU, SHRUNK, Work
from hotset.cli.options import Command, as_json_flag, check_writable, flags, given_only
from hotset.option_fields import options_of

if TYPE_CHECKING:
    import torch

# None is not given.
_FIGURES = [one if one.kind is bool else replace(one, default=None) for one in options_of(Work)]


@click.command(cls=Command)
@flags("figures", _FIGURES, given_only)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto: bfloat16; on a CPU float32")
@as_json_flag
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the JSON there, and the text beside it as .md.",
)
def command(
    device: str, dtype: str, as_json: bool, out: Path | None, figures: dict[str, Any]
) -> None:
    r"""Compare dynamic gating with static gating, as in GShard, and with transformers' experts.

    For one MoE layer and for a whole model of the paper's shape (Huang et al., NeurIPS 2024), over
    growing batches until they do not fit; then decode with all experts resident.

    \b
    Example:
      hotset bench moe-gating --device cuda --out moe_gating.json
      hotset bench moe-gating --experts 64 --hidden 256 --ffn 512 --layers 0
    """
    check_writable(out)
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
    is_shrunk = target.type != "cuda"
    work = Work(**(ON_A_CPU if is_shrunk else {}) | figures)

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
    result["shrunk"] = SHRUNK if is_shrunk else None
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
