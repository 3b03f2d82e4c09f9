"""Code for the processor at hand, compiled by LLVM (`llvmlite`) and run by torch's threads."""

import ctypes
import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

_log = logging.getLogger(__name__)

_lock = threading.Lock()
_engines: list[Any] = []  # own the code that was compiled; addresses of it are kept for good


def can_compile() -> bool:
    """Whether the package that compiles is installed: it comes with the extra `cpu`."""
    return importlib.util.find_spec("llvmlite") is not None


def has_wide_registers() -> bool:
    """Whether the processor has 32 registers of 512 bits."""
    import llvmlite.binding as llvm

    return bool(llvm.get_host_cpu_features().get("avx512f"))


def compile_function(module: Any, name: str) -> int:
    """The address of a function of an `llvmlite` module, which takes the address of its arguments.

    Raises whatever LLVM does.
    """
    import llvmlite.binding as llvm

    with _lock:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module.triple = triple = llvm.get_process_triple()
        parsed = llvm.parse_assembly(str(module))
        parsed.verify()
        machine = llvm.Target.from_triple(triple).create_target_machine(
            cpu=llvm.get_host_cpu_name(),
            features=llvm.get_host_cpu_features().flatten(),
            opt=3,
            jit=True,
        )
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        builder = llvm.create_pass_builder(machine, options)
        builder.getModulePassManager().run(parsed, builder)
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        _engines.append(engine)
        address: int = engine.get_function_address(name)
        return address


def run(function: int, arguments: Any) -> None:
    """Run compiled code in torch's threads, all with the same arguments: an array of `ctypes`."""
    _runner()(function, ctypes.addressof(arguments), torch.get_num_threads())


@functools.cache
def parallel() -> Any:
    """OpenMP's call, which runs code in the threads that torch computes with.

    It is of the library that torch has loaded, under the name that GNU's and LLVM's have. None
    where there is none; a warning says that the caller's thread computes then.
    """
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        _log.warning("compiled products run on one thread: torch has loaded no OpenMP")
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found


@functools.cache
def _runner() -> Callable[[int, int, int], None]:
    """What runs compiled code at its arguments by some threads."""
    start = parallel()
    if start is None:
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        return lambda function, arguments, num_threads: kind(function)(arguments)
    return lambda function, arguments, num_threads: start(function, arguments, num_threads, 0)
