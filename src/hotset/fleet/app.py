"""The replicas of a fleet as an application of Ray Serve, which places, watches and scales them.

Ray is imported when `build` is called: `serve deploy` and `hotset fleet` do so. No token passes
through Ray: an actor starts `hotset replica` as its child, and fronts connect to that.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotset.errors import EngineError
from hotset.fleet.child import Child, hotset_argv
from hotset.fleet.directory import Directory, Entry, default_folder, make_private
from hotset.fleet.scaling import Arrivals, Need, Scaler, ScalingOptions, replicas_needed
from hotset.option_fields import Group, option, options_of
from hotset.options import Options
from hotset.secret import secret_of

# After the time that requests have: they move, blocks go to the shared store, the engine closes.
_LEAVE_S = 2 + 60 + 5
_SERVE_S = 3  # and for Serve, which else ends the actor and so the replica
REPLICA = "serve"  # begins the ids of replicas
_HEALTH_EVERY_S = 2.0
_LOOK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class ReplicaOptions(Group):
    """How the replicas of an application are run, beside the options of their engine."""

    directory: Path | None = option(
        None, "Folder where fronts look for replicas.", otherwise="one of this user"
    )
    listen_port: int | None = option(
        None,
        "Port of its node's address where a replica listens, for fronts elsewhere; 0 is any free.",
        otherwise="a socket in the directory",
    )
    secret_file: str | None = option(
        None, "File with the fleet secret.", otherwise="one in the directory"
    )
    tls_cert: str | None = option(None, "Certificate of the replicas (PEM).", otherwise="none")
    tls_key: str | None = option(None, "Its private key (PEM).", otherwise="in that file")
    drain_s: int = option(30, "Seconds that requests may go on when a replica leaves.")
    max_surge_percent: int = option(
        0, "Replicas that a rolling upgrade may have on top, as a share; needs spare GPUs."
    )
    peers: bool = option(
        False,
        "Replicas fetch from each other's host memory, by sockets in the directory: those of one "
        "machine.",
    )
    threads: int | None = option(None, "OMP_NUM_THREADS of a replica.", otherwise="all cores")
    generation: int = option(0, "Another number starts all replicas again, one by one.")


_GROUPS: tuple[type[Group], ...] = (ReplicaOptions, ScalingOptions)


def read_args(args: Mapping[str, Any]) -> tuple[Options, ReplicaOptions, ScalingOptions]:
    """The arguments of the application: options of the engine and of the groups above, flat.

    Raises:
        ConfigError: one is not known, or cannot be used.
    """
    given = dict(args)
    made = []
    for group in _GROUPS:
        names = {one.name for one in options_of(group)} & given.keys()
        made.append(group(**{name: given.pop(name) for name in names}))
    replica, scaling = made
    assert isinstance(replica, ReplicaOptions) and isinstance(scaling, ScalingOptions)
    return Options.of(**given), replica, scaling


def build(args: dict[str, Any]) -> Any:
    """The application, for `serve deploy`, whose config names `hotset.fleet.app:build` and `args`.

    Raises:
        ConfigError: see `read_args`.
    """
    from ray import serve

    options, told, scaling = read_args(args)
    argv = hotset_argv("replica", options, drain_s=told.drain_s)
    for name in ("secret_file", "tls_cert", "tls_key"):
        if (value := getattr(told, name)) is not None:
            argv += [f"--{name.replace('_', '-')}", value]
    gpus = 0 if options.model.device == "cpu" else options.layout.num_gpus
    more: dict[str, Any] = {"num_replicas": scaling.replicas}
    if scaling.most > scaling.replicas:
        more = {"autoscaling_config": _autoscaling(scaling)}
    if gpus:
        # One bundle is on one node; a rank's death is its replica's, so they are placed as one.
        more["placement_group_bundles"] = [{"CPU": 1, "GPU": gpus}]
        more["placement_group_strategy"] = "STRICT_PACK"
    if told.max_surge_percent:
        more["max_surge_percent"] = told.max_surge_percent
    deployment = serve.deployment(
        ReplicaActor,
        name="replica",
        # A head has no CPUs to give, so that no replica is placed there, and ends with it.
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
        health_check_period_s=_HEALTH_EVERY_S,
        graceful_shutdown_timeout_s=told.drain_s + _LEAVE_S + _SERVE_S,
        max_constructor_retry_count=3,
        **more,
    )
    return deployment.bind(argv, told)


def _autoscaling(scaling: ScalingOptions) -> dict[str, Any]:
    policy = {one.name: getattr(scaling, one.name) for one in options_of(ScalingOptions)}
    return {
        "min_replicas": scaling.replicas,
        "max_replicas": scaling.most,
        # The policy itself waits before it shrinks.
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "metrics_interval_s": _HEALTH_EVERY_S,
        "look_back_period_s": 3 * _HEALTH_EVERY_S,
        "policy": {"policy_function": "hotset.fleet.app:ScalingPolicy", "policy_kwargs": policy},
    }


class ReplicaActor:
    """One replica of the deployment: starts `hotset replica`, watches it and lets it drain.

    Raises:
        EngineError: it has ended before it served.
    """

    def __init__(self, argv: list[str], told: ReplicaOptions) -> None:
        from ray import serve, util

        self._drain_s = told.drain_s
        self._id = f"{REPLICA}-{serve.get_replica_context().replica_id.unique_id}"
        folder = told.directory or default_folder()
        make_private(folder)
        make_private(folder / "logs")
        self._directory = Directory(folder)
        self._log = folder / "logs" / f"{self._id}.log"
        argv = [*argv, "--directory", str(folder), "--id", self._id]
        if told.listen_port is not None:
            argv += ["--listen", f"{util.get_node_ip_address()}:{told.listen_port}"]
        if "--remote" in argv:
            argv += ["--remote-writer", self._id]
        if told.peers:
            argv += ["--peer-url", f"unix://{folder.resolve() / self._id}.peer"]
            if "--remote-secret-file" not in argv:
                argv += ["--remote-secret-file", told.secret_file or str(secret_of(folder))]
        self._child = Child(self._id, argv, self._log, env=_environment(told.threads))
        while self._entry() is None:
            if not self._child.is_alive:
                raise EngineError(self._child.how_it_ended)
            time.sleep(_LOOK_EVERY_S)

    def check_health(self) -> None:
        """Raises EngineError where the replica has ended, or no more says that it serves."""
        self._child.trim_log()
        if not self._child.is_alive:
            raise EngineError(self._child.how_it_ended)
        if self._entry() is None:
            raise EngineError(f"{self._id} has written no entry for a while")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ScalingPolicy` asks for; nothing before the replica's first load."""
        entry = self._entry()
        return {} if entry is None else dict(entry.load)

    async def __del__(self) -> None:
        """Drain: fronts move the requests that are open after `drain_s` to other replicas."""
        await asyncio.to_thread(self._child.end, self._drain_s + _LEAVE_S)
        with contextlib.suppress(OSError):
            self._log.unlink()

    def _entry(self) -> Entry | None:
        for entry in self._directory.entries():
            if entry.replica_id == self._id and entry.pid == self._child.pid:
                return entry
        return None


class ScalingPolicy:
    """How many replicas Serve should have, from what they say of their work."""

    def __init__(self, **told: Any) -> None:
        self._told = ScalingOptions(**told)
        self._scaler = Scaler(self._told)
        self._arrivals = Arrivals()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """See `AutoscalingContext` of Ray Serve; the state that it may keep is kept here."""
        loads: dict[str, dict[str, float]] = {}
        for name, series in (context.raw_metrics or {}).items():
            for replica_id, values in series.items():
                if values:
                    loads.setdefault(str(replica_id), {})[name] = values[-1].value
        needs = [Need.of(load) for load in loads.values()]
        self._arrivals.count(
            {i: load["queued_tokens"] + load["prefilled_tokens"] for i, load in loads.items()}
        )
        needed = replicas_needed(
            needs, self._arrivals.per_s, self._arrivals.growth_per_s, self._told
        )
        return self._scaler.follow(needed), {}


def _environment(threads: int | None) -> dict[str, str]:
    """Of a replica: nothing of Ray's, whose token is not for it."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found.pop("OMP_NUM_THREADS", None)  # Ray's, by the CPUs that the actor asks for
    if threads is not None:
        found["OMP_NUM_THREADS"] = str(threads)
    return found
