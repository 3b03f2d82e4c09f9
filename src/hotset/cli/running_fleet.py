"""Runs what `hotset fleet` was asked for: its processes, its signals and what they say."""

import contextlib
import ctypes
import fcntl
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import click
import psutil

from hotset.cli.server_flags import ServerFlags, server_argv
from hotset.cost.catalog import load_model
from hotset.errors import ConfigError, EngineError, PlanError
from hotset.fleet.app import REPLICA
from hotset.fleet.child import Child, hotset_argv
from hotset.fleet.directory import Directory
from hotset.fleet.local_ray import LocalRay
from hotset.fleet.log_tail import LogTail
from hotset.fleet.scaling import ScalingOptions
from hotset.fleet.store import LocalStore, start_store
from hotset.options import Options
from hotset.secret import secret_of
from hotset.units import GIB

_LOOK_EVERY_S = 0.2
_FIRST_DELAY_S, _MOST_DELAY_S = 1.0, 30.0  # until what has ended starts again
_SETTLED_S = 60.0  # what has run for so long starts again at once
_HEAD_S = 60.0  # for Ray to start
_CUT_OFF_S = 10.0  # after `drain_s`
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class FleetFlags:
    """What was asked for; see the command."""

    options: Options
    scaling: ScalingOptions
    fronts: int
    shared_gib: float
    route: str
    server: ServerFlags


class _Kept:
    """A process that starts again when it has ended; `child` is it, where it runs already."""

    def __init__(self, make: Callable[[], Child], child: Child | None = None) -> None:
        self._make = make
        self.child = child or make()
        self._start_s = time.monotonic()
        self._due_s: float | None = None
        self._delay_s = _FIRST_DELAY_S

    def look(self) -> None:
        """Start it again when that is due."""
        if self.child.is_alive:
            return
        now_s = time.monotonic()
        if self._due_s is None:
            if now_s - self._start_s > _SETTLED_S:
                self._delay_s = _FIRST_DELAY_S
            click.echo(f"{self.child.how_it_ended}; starting it again", err=True)
            self._due_s = now_s + self._delay_s
            self._delay_s = min(_MOST_DELAY_S, 2 * self._delay_s)
        if now_s >= self._due_s:
            self._due_s, self._start_s = None, now_s
            self.child = self._make()


class Fleet:
    """All processes of a fleet on one machine, which end with this one.

    Args:
        folder: of the fleet; another fleet that runs there is refused.
        told: what was asked for.
    """

    def __init__(self, folder: Path, told: FleetFlags) -> None:
        self._folder = folder.resolve()
        self._told = told
        self._logs = self._folder / "logs"
        self._signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._kept: dict[str, _Kept] = {}
        self._generation = 0
        self._deployment: Child | None = None
        self._is_renewal_due = False

    def run(self) -> None:
        """Serve until a signal ends it.

        Raises:
            ConfigError: another fleet has the folder; EngineError: a part cannot be started.
        """
        _adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, frame: self._signals.put(number))
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone(self._folder))
            stack.callback(self._clean_up)
            self._clean_up()
            self._logs.mkdir(mode=0o700)
            prefixes = self._told.server.log_format == "text"
            tail = stack.enter_context(contextlib.closing(LogTail(self._logs, prefixes=prefixes)))
            tail.leave_out("ray-head", "ray-node", "deploy")
            ray_folder = Path(tempfile.mkdtemp(prefix="hotset-"))  # a short path
            stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
            stack.callback(_end_descendants)
            store = self._start_store()
            if store is not None:
                stack.callback(store.close)
                self._kept["store"] = _Kept(store.launch, store.process)
            self._start_servers()
            if self._start_replicas(LocalRay(ray_folder, self._logs), store):
                self._watch()
            self._stop_servers()

    def _clean_up(self) -> None:
        """Remove what processes that were killed have left."""
        shutil.rmtree(self._logs, ignore_errors=True)
        for path in self._folder.glob(f"{REPLICA}-*"):
            path.unlink(missing_ok=True)
        for name in ("desk.sock", "deployment.json", "store.sock", "store.log"):
            (self._folder / name).unlink(missing_ok=True)

    def _start_store(self) -> LocalStore | None:
        gib, gpus = self._told.shared_gib, self._told.options.layout.num_gpus
        if not gib:
            return None
        store, why = None, "neither valkey-server nor redis-server is installed"
        if gpus > 1:
            why = f"a store takes those of one GPU, and each replica has {gpus}"
        else:
            store = start_store(self._folder, int(gib * GIB))
        if store is None:
            click.echo(f"replicas share no KV blocks: {why}", err=True)
        return store

    def _start_servers(self) -> None:
        """The desk and the fronts, which wait for replicas."""
        told, server = self._told, self._told.server
        common = ["--directory", str(self._folder), "--fronts", str(told.fronts)]
        common += ["--route", told.route]
        desk = hotset_argv("desk") + common + server_argv(server, "host", "port", "cors_origins")
        self._keep("desk", desk)
        front = hotset_argv("front") + common
        front += ["--reuse-port", "--desk", str(self._folder / "desk.sock")]
        front += server_argv(server, "files_path", "files_gib", "no_files")
        for rank in range(told.fronts):
            self._keep(f"front-{rank}", [*front, "--rank", str(rank)])

    def _keep(self, name: str, argv: list[str]) -> None:
        self._kept[name] = _Kept(lambda: Child(name, argv, self._logs / f"{name}.log"))

    def _start_replicas(self, ray: LocalRay, store: LocalStore | None) -> bool:
        """Start Ray and what it runs; returns whether no signal has come meanwhile."""
        self._ray, self._store = ray, store
        self._kept["ray-head"] = _Kept(ray.start_head)
        head = self._kept["ray-head"].child
        end_s = time.monotonic() + _HEAD_S
        while not ray.head_answers():
            if not head.is_alive or time.monotonic() > end_s:
                raise EngineError(f"Ray does not start: {head.how_it_ended}")
            if self._is_signalled():
                return False
            time.sleep(_LOOK_EVERY_S)
        self._kept["ray-node"] = _Kept(ray.start_node)
        self._deploy()
        return True

    def _deploy(self) -> None:
        """Have Ray start the replicas, or start them again where the generation is another one."""
        self._is_renewal_due = False
        path = self._folder / "deployment.json"
        path.write_text(json.dumps(self._arguments()))
        self._deployment = self._ray.deploy(path)

    def _arguments(self) -> dict[str, object]:
        told, options = self._told, self._told.options
        if not self._has_gpus:  # a replica would find none, and Ray has none to give
            options = options.but(device="cpu")
        if self._store is not None:
            options = options.but(
                remote=(self._store.url,), remote_secret_file=secret_of(self._folder)
            )
        given = {
            name: value if isinstance(value, int | float | tuple | str) else str(value)
            for name, value in options.flat().items()
            if value is not None
        }
        scaling = {one.name: getattr(told.scaling, one.name) for one in fields(ScalingOptions)}
        return {
            **given,
            **scaling,
            "directory": str(self._folder),
            "drain_s": told.server.drain_s,
            "peers": _can_be_peers(told.options),
            "threads": self._threads(),
            "generation": self._generation,
        }

    @property
    def _has_gpus(self) -> bool:
        return Path("/dev/nvidiactl").exists() and self._told.options.model.device != "cpu"

    def _threads(self) -> int | None:
        """Of one replica: what the user says, or its part of the cores where it computes there."""
        if (text := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
            return int(text)
        if self._has_gpus:
            return None
        return max(1, len(os.sched_getaffinity(0)) // self._told.scaling.most)

    def _watch(self) -> None:
        """Until a signal: start again what ends, and see how a deployment ends."""
        click.echo(
            f"starting {self._told.scaling.replicas} replicas by Ray at {self._ray.address}",
            err=True,
        )
        while not self._is_signalled():
            for one in self._kept.values():
                one.look()
            if self._deployment is not None and not self._deployment.is_alive:
                self._look_at_deployment(self._deployment)
                self._deployment = None
            if self._is_renewal_due and self._deployment is None:
                self._generation += 1
                click.echo("starting all replicas again, one by one", err=True)
                self._deploy()
            time.sleep(_LOOK_EVERY_S)

    def _look_at_deployment(self, deployment: Child) -> None:
        if deployment.status == 0:
            click.echo(f"{self._told.scaling.replicas} replicas serve", err=True)
        elif not Directory(self._folder).entries():
            raise EngineError("no replica can be started; their lines above say why")
        else:
            click.echo(f"the change is not complete: {deployment.how_it_ended}", err=True)

    def _is_signalled(self) -> bool:
        """Whether to stop. SIGHUP has the replicas start again once those that start have done so.

        Replicas that start when it comes may have read their weights already.
        """
        with contextlib.suppress(queue.Empty):
            if self._signals.get_nowait() != signal.SIGHUP:
                return True
            if self._deployment is not None:
                click.echo("all replicas start again after the change under way", err=True)
            self._is_renewal_due = True
        return False

    def _stop_servers(self) -> None:
        """Let requests end, `drain_s` at most; a second signal ends them."""
        servers = [
            one.child for name, one in self._kept.items() if name.startswith(("front", "desk"))
        ]
        click.echo(f"stopping; requests have {self._told.server.drain_s} s", err=True)
        for child in servers:
            child.send(signal.SIGTERM)
        end_s = time.monotonic() + self._told.server.drain_s + _CUT_OFF_S
        while any(child.is_alive for child in servers) and time.monotonic() < end_s:
            with contextlib.suppress(queue.Empty):
                if self._signals.get(timeout=_LOOK_EVERY_S) != signal.SIGHUP:
                    for child in servers:
                        child.send(signal.SIGTERM)


def _can_be_peers(options: Options) -> bool:
    """Whether replicas can fetch from each other: not with several ranks, nor states beside KV.

    A model whose config is not here, or is not known, may keep such states.
    """
    if not options.memory.host_gib or options.layout.num_gpus > 1:
        return False
    name = options.model.model
    try:
        return name is None or not load_model(name).state_bytes
    except PlanError:
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other fleets out of a folder. Raises ConfigError: there is one."""
    with (folder / "fleet.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another fleet runs in {folder}; stop it, or give another --directory"
            ) from error
        yield


def _adopt_orphans() -> None:
    """From now on what a descendant leaves behind is this process's child, and ends with it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants() -> None:
    """End all that is left: nothing of it has a request any more."""
    me = psutil.Process()
    while found := me.children(recursive=True):
        for one in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(found, timeout=5)
