"""FlashInfer's attention kernels, built ahead of their first use and without those never called.

FlashInfer compiles a module of ten files when a wrapper first plans: kernels over paged and over
ragged KV, each for four kinds of masks. hotset calls two of these eight at most. The others are
left out here and answer `cudaErrorNotSupported`, in a module with a name of its own, so that what
other programs find in FlashInfer's cache stays whole.
"""

import fcntl
import logging
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from hotset.attention.flashinfer.latent_rows import RANK, ROPE_DIM, why_not_planned
from hotset.attention.flashinfer.long_prompts import can_expand
from hotset.attention.spec import LayerAttention

_log = logging.getLogger(__name__)

# The masks of FlashInfer's `MaskMode` that a backend is called with: none 0, causal 1. Decodes
# and prompts share the kernels of fa2; prompts alone use those of fa3.
_MASKS = {"fa2": ("0", "1"), "fa3": ("1",)}
_GENERATORS = ("_gen_batch_prefill_primary_module", "gen_batch_prefill_module")
_KERNEL = re.compile(r"_(paged|ragged)_(?:\w+_)?kernel_mask_(\d)\.cu$")
_LEFT_OUT = re.compile(r"\bU (_ZN10flashinfer\w*Dispatched\w*)")
_NOT_SUPPORTED = 801  # cudaErrorNotSupported
_NM_TIMEOUT_S = 60
_HEAD_DIMS = (64, 128, 256)
_MOST_SELECTED = 2048  # by FlashInfer's selection with fixed ties


def why_unsupported(layers: Sequence[LayerAttention], device: torch.device) -> str | None:
    """What keeps FlashInfer from running these layers on a GPU, or None where it can."""
    if any(layer.latent is not None for layer in layers):
        if reason := _why_not_selected(layers):
            return reason
        if len({replace(layer, indexer=None) for layer in layers}) != 1:
            return "layers that attend in different ways, some over latents"
        dtype = str(layers[0].dtype).removeprefix("torch.")
        return why_not_planned(layers[0].cache, dtype, torch.cuda.get_device_capability(device))
    for layer in layers:
        if layer.dtype not in (torch.float16, torch.bfloat16):
            return f"queries of {layer.dtype}"
        key_dim, value_dim = layer.heads.key_dim, layer.heads.value_dim
        if key_dim != value_dim or key_dim not in _HEAD_DIMS:
            return f"head dimensions {key_dim} and {value_dim}"
    return None


def _why_not_selected(layers: Sequence[LayerAttention]) -> str | None:
    """What keeps FlashInfer and our kernels from selecting as these layers do."""
    for indexer in {layer.indexer for layer in layers} - {None}:
        assert indexer is not None
        if indexer.top_k > _MOST_SELECTED:
            return f"a selection of {indexer.top_k} tokens"
        if indexer.key_dim < 16 or indexer.key_dim & (indexer.key_dim - 1):
            return f"an indexer's keys of {indexer.key_dim} numbers"
    return None


@dataclass(frozen=True, slots=True)
class KernelNeed:
    """What decides which module a wrapper loads.

    Attributes:
        backend: FlashInfer's `fa2`, for any GPU, or `fa3`, for Hopper.
        dtype: of queries and outputs.
        kv_dtype: of the cache.
        head_dim: of queries, keys and values.
        has_window: whether a token attends to the last ones only.
        has_softcap: whether scores are capped.
    """

    backend: str
    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    has_window: bool
    has_softcap: bool

    def arguments(self) -> tuple[Any, ...]:
        """As FlashInfer's wrappers ask for the module."""
        return (
            self.backend,
            self.dtype,
            self.kv_dtype,
            self.dtype,
            torch.int32,
            self.head_dim,
            self.head_dim,
            0,  # positions are rotated by the model
            self.has_window,
            self.has_softcap,
            False,
        )

    def module(self) -> Any:
        """FlashInfer's spec of the module, as its wrappers look it up."""
        from flashinfer import prefill

        use_paged_kernels(prefill)
        # The wrappers of FlashInfer 0.7 load fa2 as a module of another name.
        names = _GENERATORS if self.backend == "fa2" else _GENERATORS[1:]
        generate = next(getattr(prefill, name) for name in names if hasattr(prefill, name))
        return generate(*self.arguments())


@dataclass(frozen=True, slots=True)
class LatentKernelNeed:
    """What decides which module the wrapper for latents loads.

    Attributes:
        dtype: of queries, outputs and latents.
    """

    dtype: torch.dtype
    backend: str = "fa3"

    def module(self) -> Any:
        """See `KernelNeed.module`."""
        from flashinfer.jit import gen_batch_mla_module

        types = (self.dtype, self.dtype, self.dtype, torch.int32)
        return gen_batch_mla_module(self.backend, *types, RANK, ROPE_DIM, False)


@dataclass(frozen=True, slots=True)
class SelectionKernelNeed:
    """The module that selects the highest scores."""

    backend: str = "fa3"

    def module(self) -> Any:
        """See `KernelNeed.module`."""
        from flashinfer.jit.topk import gen_topk_module

        return gen_topk_module()


@dataclass(frozen=True, slots=True)
class RaggedKernelNeed:
    """What decides which module the wrapper for long prompts over latents loads.

    Attributes:
        dtype: of queries, outputs, keys and values.
        key_dim: width of keys.
        value_dim: width of values.
    """

    dtype: torch.dtype
    key_dim: int
    value_dim: int
    backend: str = "ragged"

    def module(self) -> Any:
        """See `KernelNeed.module`; for Hopper."""
        from flashinfer.prefill import gen_batch_prefill_module

        types = (self.dtype, self.dtype, self.dtype, torch.int32)
        return gen_batch_prefill_module(
            "fa3", *types, self.key_dim, self.value_dim, 0, False, False, False
        )


# One module each.
Need: TypeAlias = KernelNeed | LatentKernelNeed | SelectionKernelNeed | RaggedKernelNeed


class KernelBuild:
    """Builds modules in threads; a wrapper that plans for one before its end waits for it.

    A build that fails is left to that wrapper, which tries again and says what is wrong.

    Args:
        needs: one module each; all at once, as most of their files are compiled in one thread.
    """

    def __init__(self, needs: Sequence[Need]) -> None:
        self._threads = {
            need: threading.Thread(target=_build, args=(need,), name="hotset-kernels", daemon=True)
            for need in dict.fromkeys(needs)
        }
        for thread in self._threads.values():
            thread.start()

    def is_ready(self, backend: str) -> bool:
        """Whether the builds for a backend have ended, well or not."""
        return not any(
            thread.is_alive() for need, thread in self._threads.items() if need.backend == backend
        )

    def wait(self, backend: str) -> None:
        """Block until `is_ready`."""
        for need, thread in self._threads.items():
            if need.backend == backend:
                thread.join()


def start_kernels(
    layers: Sequence[LayerAttention], kv_dtype: torch.dtype, device: torch.device
) -> KernelBuild | None:
    """Start to build what FlashInfer needs for these layers; None where it cannot run."""
    has_latents = layers[0].latent is not None
    if device.type != "cuda" or why_unsupported(layers, device) is not None:
        return None
    try:
        import flashinfer  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return None  # the backend says so
    if has_latents:
        dtype, heads = layers[0].dtype, layers[0].heads
        if layers[0].indexer is not None:
            return KernelBuild([LatentKernelNeed(dtype), SelectionKernelNeed()])
        ragged = RaggedKernelNeed(dtype, heads.key_dim, heads.value_dim)
        return KernelBuild([LatentKernelNeed(dtype), *[ragged] * can_expand(heads)])
    needs = []
    for layer in layers:
        for backend, stored in (("fa2", kv_dtype), ("fa3", layer.dtype)):
            if backend == "fa2" or has_hopper_kernel(device, layer.dtype, layer.dtype):
                needs.append(
                    KernelNeed(
                        backend,
                        layer.dtype,
                        stored,
                        layer.heads.key_dim,
                        layer.cache.window is not None,
                        layer.softcap is not None,
                    )
                )
    return KernelBuild(needs)


def has_hopper_kernel(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether FlashInfer attends with these types by its kernel for Hopper, on `device`."""
    from flashinfer.utils import determine_attention_backend

    return bool(determine_attention_backend(device, 0, False, False, dtype, kv_dtype) == "fa3")


def use_paged_kernels(prefill: Any) -> None:
    """Have the wrappers of `flashinfer.prefill` load modules without the kernels left out."""
    for name in _GENERATORS:
        made: Callable[..., Any] | None = getattr(prefill, name, None)
        if made is not None and not isinstance(made, _PagedOnly):
            setattr(prefill, name, _PagedOnly(made))


def _build(need: Need) -> None:
    try:
        spec = need.module()
        if not spec.is_aot:  # built before by the package `flashinfer-jit-cache`
            spec.build(verbose=False, need_lock=True)
    except Exception as error:  # whatever a compiler that is not there makes of it
        _log.debug("FlashInfer's module for %s is left to its first use: %.300s", need, error)


@dataclass(frozen=True, slots=True)
class _PagedOnly:
    """A function of FlashInfer that makes the spec of a module, without the unused kernels."""

    generate: Callable[..., Any]

    def __call__(self, backend: str, *arguments: Any, **options: Any) -> Any:
        spec = self.generate(backend, *arguments, **options)
        if arguments[4:5] != arguments[5:6]:  # over ragged KV: keys and values of latents
            return spec
        try:
            return without_unused(spec, _MASKS[backend])
        except Exception as error:  # another version's spec may be of another form
            _log.debug("FlashInfer's module %s is built whole: %.300s", spec.name, error)
            return spec


def without_unused(spec: Any, masks: Sequence[str]) -> Any:
    """A spec of FlashInfer with the kernels over paged KV for `masks` alone, built.

    Raises:
        RuntimeError: it cannot be built; OSError or SubprocessError: its symbols cannot be read.
    """
    sources = [source for source in spec.sources if _is_used(source.name, masks)]
    if len(sources) == len(spec.sources) or spec.is_aot:
        return spec  # another version of FlashInfer, or nothing to be built
    kept = replace(spec, name=f"{spec.name}_paged", sources=sources)
    stubs = sources[0].parent / "left_out.cpp"
    if not stubs.exists():
        # Another process's build with the stubs would hide what the library lacks without them.
        with _locked(stubs.with_suffix(".lock")):
            if not stubs.exists():
                kept.build(verbose=False, need_lock=True)
                written = stubs.with_suffix(".new")
                written.write_text(_stubs(kept.jit_library_path), "utf-8")
                written.replace(stubs)
    return replace(kept, sources=[*sources, stubs])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within it no other thread or process has the lock of this path."""
    with path.open("wb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _is_used(name: str, masks: Sequence[str]) -> bool:
    kernel = _KERNEL.search(name)
    return kernel is None or (kernel[1] == "paged" and kernel[2] in masks)


def _stubs(library: Path) -> str:
    """Source of the functions that `library` calls and has not got."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library],
        capture_output=True,
        text=True,
        check=True,
        timeout=_NM_TIMEOUT_S,
    ).stdout
    names = sorted(set(_LEFT_OUT.findall(symbols)))
    lines = [f'extern "C" int {name}() {{ return {_NOT_SUPPORTED}; }}' for name in names]
    return "// kernels that hotset never calls\n" + "\n".join(lines) + "\n"
