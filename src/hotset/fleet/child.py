"""A process of a fleet, as what started it sees it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from hotset.errors import ConfigError, EngineError
from hotset.options import OPTIONS, Options

_MOST_LOG_BYTES = 16 << 20


def hotset_argv(command: str, options: Options | None = None, **flags: object) -> list[str]:
    """A command of hotset, with the options that are not as by default and with more flags.

    Args:
        command: its name.
        options: of an engine.
        flags: values by name; False and None are left out, True stands alone.

    Raises:
        ConfigError: an option that has no flag is not as by default.
    """
    argv = [sys.executable, "-m", "hotset", command]
    given = {} if options is None else options.flat()
    for name, value in given.items():
        one = OPTIONS[name]
        if value == one.default:
            continue
        if not one.flags:
            raise ConfigError(f"{name} is {value!r}, and has no flag of `hotset {command}`")
        for part in value if isinstance(value, tuple) else (value,):
            if part is True:
                argv.append(one.flags[0].partition("/")[0])
            elif part is False:
                argv.append(one.flags[0].partition("/")[2])
            else:
                argv += [one.flags[0], str(part)]
    for name, flag in flags.items():
        if flag is True:
            argv.append(f"--{name.replace('_', '-')}")
        elif flag is not None and flag is not False:
            argv += [f"--{name.replace('_', '-')}", str(flag)]
    return argv


class Child:
    """A running program that ends when this process does.

    Args:
        name: in messages.
        argv: the program and its arguments.
        log: file to which what it says is added.
        env: of the program; None is this process's.

    Raises:
        EngineError: it cannot be started.
    """

    def __init__(
        self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._log = log
        self._start_bytes = log.stat().st_size if log.exists() else 0
        self._started = threading.Event()
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        # The leash counts the life of the thread that starts the program: one that waits for it.
        threading.Thread(
            target=self._run, args=(argv, env), name=f"hotset-{name}", daemon=True
        ).start()
        self._started.wait()
        if self._error is not None:
            raise EngineError(f"{name} cannot be started: {self._error}")

    def _run(self, argv: Sequence[str], env: Mapping[str, str] | None) -> None:
        leash = [sys.executable, "-m", "hotset.fleet.leash", str(os.getpid())]
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*leash, *argv],
                    env=None if env is None else dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the process that started it
                )
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self._started.set()
        self._process.wait()
        self._ended.set()

    @property
    def pid(self) -> int:
        """Of the program."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self._ended.is_set()

    @property
    def status(self) -> int | None:
        """With which it has ended; None while it lives."""
        assert self._process is not None
        return self._process.returncode if self._ended.is_set() else None

    @property
    def how_it_ended(self) -> str:
        """One line: the last that it said, or its status."""
        assert self._process is not None
        with self._log.open("rb") as log:
            log.seek(min(self._start_bytes, log.seek(0, os.SEEK_END)))
            lines = log.read()[-65536:].decode(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        status = self._process.returncode
        if status is not None and status < 0:
            return f"{self.name} was ended by {signal.Signals(-status).name}"
        return f"{self.name} has ended ({status}): {last.removeprefix('error: ')}"

    def trim_log(self) -> None:
        """Empty a log that has become large; the program appends to it."""
        if self._log.stat().st_size > _MOST_LOG_BYTES:
            os.truncate(self._log, 0)
            self._start_bytes = 0

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it lives."""
        assert self._process is not None
        if self.is_alive:
            self._process.send_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; returns whether it came."""
        return self._ended.wait(timeout_s)

    def end(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL to what is still there after a while."""
        self.send(signal.SIGTERM)
        if not self.wait(timeout_s):
            self.send(signal.SIGKILL)
            self._ended.wait()
