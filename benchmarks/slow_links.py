"""A slow, lossy or cut link to a network namespace, for `fleet_networks.py`.

A namespace has one network device, a TUN device, and this process carries each packet between it
and a second TUN device outside: later, at a rate, or not at all. It stands in for `tc netem`, of
which a kernel may have been built without; TCP on both sides is the kernel's own.
"""

import contextlib
import ctypes
import fcntl
import heapq
import multiprocessing
import os
import random
import select
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MOST_QUEUED_S = 0.5  # a packet that would wait longer for the rate is dropped
_FIELDS = ("delay_s", "jitter_s", "loss", "bytes_per_s", "is_cut_in", "is_cut_out")


@dataclass(frozen=True, slots=True)
class Conditions:
    """How both directions of a link are.

    Attributes:
        delay_s: of each packet, give or take `jitter_s`; packets keep their order.
        loss: share of packets that are dropped.
        bytes_per_s: 0 is without bound.
        is_cut_in: drop all packets into the namespace.
        is_cut_out: drop all packets that come from it.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = 0.0
    is_cut_in: bool = False
    is_cut_out: bool = False


class Link:
    """A namespace and the process that carries its packets. Needs to be root.

    Attributes:
        netns: its name; a command runs there by `ip netns exec NAME`.
        inside: its address.
        outside: the address of this side of the link.
    """

    def __init__(self, number: int) -> None:
        self.netns = f"hotset-{os.getpid()}-{number}"
        self.inside, self.outside = f"10.213.{number}.1", f"10.213.{number}.2"
        self._now = multiprocessing.Array(ctypes.c_double, len(_FIELDS), lock=False)
        names = [f"hs{os.getpid() % 10**6}{side}{number}" for side in "io"]
        fds = [_open_tun(name) for name in names]
        _ip("netns", "add", self.netns)
        _ip("link", "set", names[0], "netns", self.netns)
        for name, own, peer, where in (
            (names[0], self.inside, self.outside, ("netns", "exec", self.netns, "ip")),
            (names[1], self.outside, self.inside, ()),
        ):
            _ip(*where, "addr", "add", own, "peer", peer, "dev", name)
            _ip(*where, "link", "set", name, "up")
        _ip("netns", "exec", self.netns, "ip", "link", "set", "lo", "up")
        self._carrier = multiprocessing.get_context("fork").Process(
            target=_carry, args=(fds[0], fds[1], self._now), daemon=True
        )
        self._carrier.start()
        for fd in fds:
            os.close(fd)

    def set(self, conditions: Conditions) -> None:
        """Packets from now on meet these."""
        for place, name in enumerate(_FIELDS):
            self._now[place] = float(getattr(conditions, name))

    def close(self) -> None:
        """End the carrier; its devices and the namespace go with it."""
        self._carrier.kill()
        self._carrier.join()
        _ip("netns", "del", self.netns)


@contextlib.contextmanager
def links(count: int) -> Iterator[list[Link]]:
    """As many links, closed at the end."""
    with contextlib.ExitStack() as stack:
        made = []
        for number in range(count):
            made.append(Link(number))
            stack.callback(made[-1].close)
        yield made


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


def _open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


class _Direction:
    """Packets of one direction that are on their way, in order."""

    def __init__(self, target: int, cut: int) -> None:
        self.target = target
        self._cut = cut  # its place among the conditions
        self._free_s = 0.0  # when the link has sent what it was given
        self._last_s = 0.0  # when the last packet is due
        self._random = random.Random(cut)

    def due_s(self, size: int, now_s: float, conditions: list[float]) -> float | None:
        """When a packet arrives; None if it never does."""
        delay_s, jitter_s, loss, rate = conditions[:4]
        if conditions[self._cut] or self._random.random() < loss:
            return None
        if rate:
            self._free_s = max(self._free_s, now_s)
            if self._free_s - now_s > _MOST_QUEUED_S:
                return None
            self._free_s += size / rate
        sent_s = self._free_s if rate else now_s
        due_s = sent_s + delay_s + self._random.uniform(-jitter_s, jitter_s)
        self._last_s = max(self._last_s, due_s)
        return self._last_s


def _carry(inside: int, outside: int, now: "ctypes.Array[ctypes.c_double]") -> None:
    """Carry packets for ever; a process of its own."""
    ways = {inside: _Direction(outside, 5), outside: _Direction(inside, 4)}
    waiting: list[tuple[float, int, int, bytes]] = []
    poll, number = select.poll(), 0
    for fd in ways:
        poll.register(fd, select.POLLIN)
    while True:
        left_s = waiting[0][0] - time.monotonic() if waiting else 60.0
        for fd, _ in poll.poll(max(0.0, left_s * 1e3)):
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(fd, 65536)
                    now_s = time.monotonic()
                    due_s = ways[fd].due_s(len(packet), now_s, list(now))
                    if due_s is not None:
                        number += 1
                        heapq.heappush(waiting, (due_s, number, ways[fd].target, packet))
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):
                os.write(target, packet)
