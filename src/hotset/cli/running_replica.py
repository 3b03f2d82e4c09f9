"""Runs the replica that `hotset replica` was asked for: its engine, its signals and its entry."""

import contextlib
import dataclasses
import hashlib
import os
import queue
import signal
import time
from pathlib import Path
from types import FrameType

import click

from hotset.engine.messages import EngineHost, Load, Report
from hotset.engine.process import EngineProcess
from hotset.errors import EngineError
from hotset.fleet.directory import Entry, Registration
from hotset.fleet.listener import Listener
from hotset.fleet.wire import VERSIONS
from hotset.options import Options

_LOAD_EVERY_S = 1.0
# After the time that requests have: until the last of them is told to its front.
_MOVE_S = 2.0


def run(options: Options, listener: Listener, folder: Path, drain_s: float) -> None:
    """Serve fronts until a signal ends it; closes the listener.

    Raises:
        HotsetError: the model cannot be loaded, or the engine has failed.
    """
    events: queue.SimpleQueue[str | int] = queue.SimpleQueue()  # signals, or why the engine ended

    def take_report(report: Report) -> None:
        listener.take_report(report)
        if report.failure is not None:
            events.put(report.failure)

    def interrupt(number: int, frame: FrameType | None) -> None:
        click.echo("interrupted", err=True)
        os._exit(128 + number)  # the engine's process ends with this one

    _on_signals(interrupt)
    with contextlib.closing(listener):
        click.echo(f"listening at {listener.address}; loading the model", err=True)
        host = EngineProcess(options, None, take_report)
        _on_signals(lambda number, frame: events.put(number))
        with contextlib.closing(host):
            listener.serve(host)
            entry = _entry(host, listener)
            with contextlib.closing(Registration(folder, entry)) as registration:
                click.echo(
                    f"{host.info.report}\nserving {entry.model} at {entry.address} as "
                    f"{entry.replica_id}",
                    err=True,
                )
                _serve(events, listener, registration, drain_s)


def _serve(
    events: "queue.SimpleQueue[str | int]",
    listener: Listener,
    registration: Registration,
    drain_s: float,
) -> None:
    """Until a signal has come and requests have ended or moved. Raises EngineError."""
    end_s: float | None = None
    while end_s is None or (listener.num_open and time.monotonic() < end_s):
        try:
            event = events.get(timeout=_LOAD_EVERY_S if end_s is None else 0.1)
        except queue.Empty:
            registration.set_load(_numbers(listener.load))
            continue
        if isinstance(event, str):
            raise EngineError(event)
        left_s = drain_s if end_s is None else 0.0  # none at a second signal
        click.echo(f"stopping; {listener.num_open} requests have {left_s:g} s", err=True)
        end_s = time.monotonic() + left_s + _MOVE_S
        listener.drain(left_s)
        registration.set_draining()


def _on_signals(handler: "signal._HANDLER") -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _entry(host: EngineHost, listener: Listener) -> Entry:
    made_of = f"{host.info.fingerprint} {host.info.numerics}"
    blocks = hashlib.blake2b(made_of.encode(), digest_size=8)
    return Entry(
        listener.replica_id,
        str(listener.address.for_others()),
        os.getpid(),
        host.model.name,
        host.model.fingerprint,
        blocks.hexdigest(),
        VERSIONS,
    )


def _numbers(load: Load | None) -> dict[str, float]:
    """The fields of a load that are numbers."""
    if load is None:
        return {}
    found = {one.name: getattr(load, one.name) for one in dataclasses.fields(load)}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
