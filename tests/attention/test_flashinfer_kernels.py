"""Building FlashInfer's kernels ahead, and without those that are never called."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from hotset.attention.flashinfer.kernels import (
    KernelBuild,
    KernelNeed,
    use_paged_kernels,
    without_unused,
)

NEED = KernelNeed("fa3", torch.bfloat16, torch.bfloat16, 128, False, False)
CALLS_TWO = """
namespace flashinfer {
template <int MASK> int PagedDispatched();
extern template int PagedDispatched<1>();
extern template int PagedDispatched<2>();
}
extern "C" int used() { return flashinfer::PagedDispatched<1>(); }
extern "C" int never() { return flashinfer::PagedDispatched<2>(); }
"""
HAS_ONE = """
namespace flashinfer {
template <int MASK> int PagedDispatched() { return MASK; }
template int PagedDispatched<1>();
}
"""


@dataclass(frozen=True)
class Spec:
    """FlashInfer's `JitSpec` with g++ in place of nvcc; notes what was compiled together."""

    name: str
    sources: Sequence[Path]
    folder: Path
    built: list[list[str]] = field(default_factory=list)
    is_aot: bool = False

    @property
    def jit_library_path(self) -> Path:
        return self.folder / f"{self.name}.so"

    def build(self, *, verbose: bool, need_lock: bool = False) -> None:
        assert not verbose and need_lock  # which FlashInfer 0.7 takes only if asked to
        self.built.append([source.name for source in self.sources])
        command = ["g++", "-x", "c++", "-shared", "-fPIC", "-o", self.jit_library_path]
        subprocess.run([*command, *self.sources], check=True, timeout=60)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    texts = {"batch_prefill.cu": CALLS_TWO, "batch_prefill_paged_sm90_kernel_mask_1.cu": HAS_ONE}
    for mask in ("0", "2", "3"):
        texts[f"batch_prefill_paged_sm90_kernel_mask_{mask}.cu"] = "not to be compiled"
    for mask in "0123":
        texts[f"batch_prefill_ragged_kernel_mask_{mask}.cu"] = "not to be compiled"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return Spec("module", [tmp_path / name for name in texts], tmp_path)


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="no g++ or nm")
def test_kernels_left_out_answer_that_they_are_not_supported(spec: Spec) -> None:
    made = without_unused(spec, ["1"])
    made.build(verbose=False, need_lock=True)
    library = ctypes.CDLL(str(made.jit_library_path))
    assert made.name != spec.name  # others may share the cache
    assert library.used() == 1
    assert library.never() == 801  # cudaErrorNotSupported
    again = without_unused(spec, ["1"])
    assert again.sources == made.sources and len(spec.built) == 2  # found, not built again


@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="no g++ or nm")
def test_what_is_left_out_is_found_once_by_builds_at_the_same_time(spec: Spec) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(without_unused, [spec] * 3, [["1"]] * 3))
    assert [one.sources for one in made] == [made[0].sources] * 3
    assert "PagedDispatched" in made[0].sources[-1].read_text()
    assert len(spec.built) == 1  # one with the stubs would be read by another that looks for them


def test_a_module_of_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    spec = Spec("module", [tmp_path / "prefill.cu", tmp_path / "binding.cu"], tmp_path)
    assert without_unused(spec, ["1"]) is spec


def test_a_module_that_cannot_be_cut_is_built_whole(spec: Spec, tmp_path: Path) -> None:
    class Prefill:
        @staticmethod
        def gen_batch_prefill_module(backend: str, *arguments: object) -> Spec:
            assert (backend, *arguments) == NEED.arguments()
            return spec

    spec.sources[0].write_text("this does not compile")
    prefill = Prefill()
    use_paged_kernels(prefill)
    use_paged_kernels(prefill)  # once is enough
    assert prefill.gen_batch_prefill_module(*NEED.arguments()) is spec


def test_a_build_that_fails_is_left_to_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    build = KernelBuild([NEED, NEED])
    build.wait("fa3")
    assert build.is_ready("fa3") and build.is_ready("fa2")


@pytest.mark.parametrize("is_aot", [False, True])
def test_a_module_that_came_built_is_not_built_again(spec: Spec, is_aot: bool) -> None:
    class Need:
        backend = "fa3"

        def module(self) -> Spec:
            return replace(spec, sources=[], is_aot=is_aot, name="selection")

    build = KernelBuild([Need()])  # type: ignore[list-item]
    build.wait("fa3")
    assert bool(spec.built) != is_aot
