"""Measure this machine: memory, copies, link, disk, products and launches, as a hardware profile.

Everything here is bounded in time; the whole takes well under a minute. torch is imported when a
measurement starts, so that planning never waits for it.
"""

import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hotset.cgroups import memory_limit_bytes
from hotset.cpu_libraries import set_threads
from hotset.errors import ConfigError

MIB = 2**20
SIZES = (16 * 1024, 64 * 1024, 256 * 1024, MIB, 4 * MIB, 64 * MIB, 256 * MIB)
CPU_SIZES = (64 * 1024, MIB, 16 * MIB, 128 * MIB)
DISK_BYTES = 256 * MIB
DISK_READ = 4 * MIB
SHARE_S = 0.4  # time each figure may take, beside its first run

Profile = dict[str, Any]


def probe(device: str, disk_path: Path | None, *, gpus: int = 1) -> Profile:
    """Measure and return a profile that `hardware_from_json` reads.

    Args:
        device: `cpu` or `cuda`; `auto` takes a GPU if there is one.
        disk_path: folder in which a temporary file of 256 MiB is written and read; None leaves
            the disk out.
        gpus: up to how many are measured together, in processes of their own.

    Raises:
        ConfigError: there is no such device, there are fewer GPUs, or the folder cannot be written.
    """
    import torch

    from hotset.plan import probe_ranks

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is usable here; run 'hotset probe --device cpu'")
    probe_ranks.check_gpus(device, gpus)
    set_threads(None)  # as the engine computes
    started = time.perf_counter()
    disk = None if disk_path is None else _disk_bytes_per_s(disk_path)
    profile = _cuda() if device == "cuda" else _cpu()
    if disk:
        profile["figures"]["disk_gb_per_s"] = _figure(disk / 1e9, "4 MiB reads, 4 at a time")
    if gpus > 1:
        profile["together"] = probe_ranks.probe_ranks(device, gpus)
    profile["measured"] = True
    profile["probe_s"] = round(time.perf_counter() - started, 1)
    return profile


def _figure(value: float, how: str) -> dict[str, object]:
    """Four digits, and where they come from."""
    return {"value": float(f"{value:.4g}"), "source": f"hotset probe: {how}"}


def _median_s(run: Callable[[], object], sync: Callable[[], object] = lambda: None) -> float:
    """Median time of a call, after one that warms up; at least 3 and at most 50 calls."""
    run()
    sync()
    times: list[float] = []
    deadline = time.perf_counter() + SHARE_S
    while len(times) < 3 or (len(times) < 50 and time.perf_counter() < deadline):
        start = time.perf_counter()
        run()
        sync()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# -- CPU ----------------------------------------------------------------------------------------


def _host_copies() -> dict[int, float]:
    """Bytes/s read plus written by a copy, by size."""
    import torch

    rates = {}
    for size in CPU_SIZES:
        source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
        rates[size] = 2 * size / _median_s(lambda s=source, t=target: t.copy_(s))  # type: ignore[misc]
    return rates


def _product_flops(device: str, dtype: Any, size: int, sync: Callable[[], object]) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median_s(lambda: torch.mm(a, b, out=out), sync)


def _cpu() -> Profile:
    import torch

    copies = _host_copies()
    memory = copies[max(copies)]
    gb = memory_limit_bytes() / 1e9
    flops = {
        name: _product_flops("cpu", dtype, 1024, lambda: None)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    tiny = torch.zeros(16)

    def launches() -> None:
        for _ in range(1000):
            tiny.add_(1.0)

    threads = torch.get_num_threads()
    name = platform.processor() or platform.machine()
    copy = f"copy of {max(copies) // MIB} MiB, read plus write, {threads} threads"
    none = "no other device: the memory of the CPU itself"
    return {
        "name": "this",
        "description": f"{name} CPU, {threads} threads, {gb:.0f} GB",
        "figures": {
            "hbm_gb": _figure(gb, "memory this process may use"),
            "hbm_gb_per_s": _figure(memory / 1e9, copy),
            "tflops": {
                k: _figure(v / 1e12, f"{k} product of 1024 x 1024") for k, v in flops.items()
            },
            "peer_gb_per_s": _figure(memory / 1e9, none),
            "peer_gpus": _figure(1, none),
            "network_gb_per_s": _figure(1.25, "not measured; 10 Gb/s assumed"),
            "host_link": {"value": "memory copy", "source": none},
            "host_link_gb_per_s": _figure(memory / 2e9, f"one way of a {copy}"),
            "gpus_per_host_link": _figure(1, none),
            "gpus_per_host": _figure(1, none),
            "host_gb": _figure(0, none),
            "host_memory_gb_per_s": _figure(memory / 1e9, copy),
            "disk_gb": _figure(0, "give --disk-gib to use some"),
            "disk_gb_per_s": _figure(0.1, "not measured; 0.1 GB/s assumed"),
            "kernel_us": _figure(_median_s(launches) * 1e3, "add to 16 numbers, each of 1000"),
        },
        "copies_gb_per_s": {"memory": {str(k): v / 1e9 for k, v in copies.items()}},
    }


# -- CUDA ---------------------------------------------------------------------------------------


def _link_copies(torch: Any) -> dict[str, dict[int, float]]:
    """Bytes/s between pinned memory and the device, by way and size.

    `both` is the sum of two copies that run at once, one each way, on streams of their own.
    """
    up, down = torch.cuda.Stream(), torch.cuda.Stream()
    rates: dict[str, dict[int, float]] = {"up": {}, "down": {}, "both": {}}
    for size in SIZES:
        # Small copies go many to a measurement: what counts is the rate of a queue of them.
        count = max(1, min(64, 64 * MIB // size))
        host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]

        def run(ways: str, n: int = count, h: Any = host, d: Any = device) -> None:
            for _ in range(n):
                if ways in ("up", "both"):
                    with torch.cuda.stream(up):
                        d[0].copy_(h[0], non_blocking=True)
                if ways in ("down", "both"):
                    with torch.cuda.stream(down):
                        h[1].copy_(d[1], non_blocking=True)

        for ways, per_run in (("up", 1), ("down", 1), ("both", 2)):
            seconds = _median_s(lambda w=ways: run(w), torch.cuda.synchronize)  # type: ignore[misc]
            rates[ways][size] = per_run * count * size / seconds
    return rates


def _kernel_s(torch: Any) -> float:
    """Time of one small kernel among many in a CUDA graph, as decode replays them."""
    count = 500
    small = torch.zeros(1024, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        small.add_(1.0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            small.add_(1.0)
    return _median_s(graph.replay, torch.cuda.synchronize) / count


def _eager_launch_s(torch: Any) -> float:
    small = torch.zeros(1024, device="cuda")

    def run() -> None:
        for _ in range(500):
            small.add_(1.0)

    return _median_s(run, torch.cuda.synchronize) / 500


def _hbm_copy(torch: Any) -> float:
    free = torch.cuda.mem_get_info()[0]
    size = int(min(2**30, free // 4))
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * size / _median_s(lambda: target.copy_(source), torch.cuda.synchronize)


def _peer_copy(torch: Any, fallback: float) -> tuple[float, str]:
    if torch.cuda.device_count() < 2:
        return fallback, "one GPU: nothing to measure, the host link's rate"
    size = 256 * MIB
    source = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    target = torch.empty(size, dtype=torch.uint8, device="cuda:1")

    def sync() -> None:
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)

    rate = size / _median_s(lambda: target.copy_(source, non_blocking=True), sync)
    return rate, "256 MiB from GPU 0 to GPU 1"


def _cuda() -> Profile:
    import torch

    properties = torch.cuda.get_device_properties(0)
    links = _link_copies(torch)
    largest = max(SIZES)
    link = min(links["up"][largest], links["down"][largest])
    hbm = _hbm_copy(torch)
    flops = {"bf16": _product_flops("cuda", torch.bfloat16, 8192, torch.cuda.synchronize)}
    flops["fp32"] = _product_flops("cuda", torch.float32, 4096, torch.cuda.synchronize)
    kernel_s, eager_s = _kernel_s(torch), _eager_launch_s(torch)
    peer, peer_how = _peer_copy(torch, link)
    host_memory = _host_copies()[max(CPU_SIZES)]
    torch.cuda.empty_cache()
    gpus = torch.cuda.device_count()
    return {
        "name": "this",
        "description": f"{gpus} x {properties.name}",
        "figures": {
            "hbm_gb": _figure(properties.total_memory / 1e9, "total memory of the device"),
            "hbm_gb_per_s": _figure(hbm / 1e9, "copy of up to 1 GiB, read plus write"),
            "tflops": {
                k: _figure(v / 1e12, f"{k} product of {n} x {n}")
                for (k, v), n in zip(flops.items(), (8192, 4096), strict=True)
            },
            "peer_gb_per_s": _figure(peer / 1e9, peer_how),
            "peer_gpus": _figure(gpus, "GPUs seen"),
            "network_gb_per_s": _figure(12.5, "not measured; 100 Gb/s assumed"),
            "host_link": {"value": "host link", "source": "hotset probe"},
            "host_link_gb_per_s": _figure(
                link / 1e9, "pinned copies of 256 MiB, one way, the slower of the two"
            ),
            "gpus_per_host_link": _figure(1, "not measured; one GPU was copied to at a time"),
            "gpus_per_host": _figure(gpus, "GPUs seen"),
            "host_gb": _figure(memory_limit_bytes() * 0.8e-9, "0.8 of what this process may use"),
            "host_memory_gb_per_s": _figure(
                max(host_memory, link) / 1e9, "copy by the CPU, read plus write, or the link"
            ),
            "disk_gb": _figure(0, "give --disk-gib to use some"),
            "disk_gb_per_s": _figure(1.0, "not measured; 1 GB/s assumed"),
            "kernel_us": _figure(kernel_s * 1e6, "small kernels in a CUDA graph, each of 500"),
        },
        "eager_launch_us": eager_s * 1e6,
        "copies_gb_per_s": {
            way: {str(size): rate / 1e9 for size, rate in rates.items()}
            for way, rates in links.items()
        },
    }


# -- disk ---------------------------------------------------------------------------------------


def _disk_bytes_per_s(folder: Path) -> float:
    """Read rate of a file just written, past the page cache where the file system allows."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="hotset-probe-") as file:
            block = os.urandom(DISK_READ)
            for _ in range(DISK_BYTES // DISK_READ):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _read_rate(file.name)
    except OSError as error:
        raise ConfigError(
            f"disk probe in {folder} failed: {error.strerror or error}; give disk_path a folder "
            "with 256 MiB free, or leave the disk out (no_disk)"
        ) from error


def _read_rate(name: str) -> float:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(name, os.O_RDONLY | direct)
    except OSError:  # tmpfs and some network file systems have no O_DIRECT
        fd = os.open(name, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        workers = 4
        buffers = [
            mmap.mmap(-1, DISK_READ) for _ in range(workers)
        ]  # page-aligned, as O_DIRECT asks

        def read(worker: int) -> int:
            done = 0
            for offset in range(worker * DISK_READ, DISK_BYTES, workers * DISK_READ):
                done += os.preadv(fd, [buffers[worker]], offset)
            return done

        start = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            done = sum(pool.map(read, range(workers)))
        return done / (time.perf_counter() - start)
    finally:
        os.close(fd)
