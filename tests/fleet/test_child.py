"""Processes of a fleet end with what started them, and say how they ended."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import psutil
import pytest

from hotset.cli.options import engine_options
from hotset.errors import ConfigError, EngineError
from hotset.fleet.child import Child, hotset_argv
from hotset.fleet.log_tail import LogTail
from hotset.options import Options

PYTHON = [sys.executable, "-c"]
SLEEP = [*PYTHON, "import time; print('up', flush=True); time.sleep(60)"]
PARENT = """
import sys, time
from pathlib import Path
from hotset.fleet.child import Child
child = Child("a", [sys.executable, "-c", "import time; time.sleep(60)"], Path(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(60)
"""


def wait_for_text(path: Path, text: str) -> None:
    for _ in range(1000):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(path.read_text() if path.exists() else "no file")


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*PYTHON, PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_child_is_told_to_end_and_then_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = Child("a", SLEEP, log)
    wait_for_text(log, "up")
    assert child.is_alive and child.status is None
    child.end(10)
    assert not child.is_alive
    assert child.how_it_ended == "a was ended by SIGTERM"
    child.end(10)  # it has ended
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True)"
    child = Child("b", [*PYTHON, f"{deaf}; time.sleep(60)"], log)
    wait_for_text(log, "deaf")
    child.end(0.1)
    assert child.how_it_ended == "b was ended by SIGKILL"


def test_how_a_child_ended_is_the_last_line_that_it_said(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("of another one\n")
    code = "import sys; print('loading'); sys.exit('error: there is no model')"
    child = Child("a", [*PYTHON, code], tmp_path / "log")
    assert child.wait(30)
    assert child.how_it_ended == "a has ended (1): there is no model"
    child = Child("a", [*PYTHON, ""], tmp_path / "log")
    assert child.wait(30)
    assert child.how_it_ended == "a has ended (0): "
    with pytest.raises(EngineError, match="a cannot be started"):
        Child("a", SLEEP, tmp_path / "nowhere" / "log")


def test_options_on_the_command_line_are_read_as_they_were() -> None:
    options = Options.of(
        model="a model",
        hot_gib=0.5,
        max_num_seqs=7,
        remote=("redis://a:1", "redis://b:1"),
        remote_secret_file="secret",
        eager=True,
    )
    seen: list[Options] = []

    @click.command()
    @click.option("--drain-s", type=int)
    @click.option("--once", is_flag=True)
    @engine_options
    def command(options: Options, drain_s: int, once: bool) -> None:
        seen.append(options)
        assert (drain_s, once) == (9, True)

    argv = hotset_argv("replica", options, drain_s=9, once=True, off=False, unset=None)
    assert argv[:4] == [sys.executable, "-m", "hotset", "replica"]
    command(argv[4:], standalone_mode=False)
    assert seen == [options]
    with pytest.raises(ConfigError, match="seed is 7, and has no flag of `hotset replica`"):
        hotset_argv("replica", Options.of(seed=7))


def test_a_tail_copies_whole_lines_of_logs_that_come_grow_and_are_emptied(tmp_path: Path) -> None:
    said = io.StringIO()
    log, other = tmp_path / "a.log", tmp_path / "ray.log"
    with contextlib.closing(LogTail(tmp_path, prefixes=True, to=said)) as tail:
        tail.leave_out("ray")
        other.write_text("no\n")
        log.write_text("one\ntw")
        wait_for(said, "a: one\n")
        with log.open("a") as file:
            file.write("o\n")
        wait_for(said, "a: one\na: two\n")
        os.truncate(log, 0)
        time.sleep(0.5)
        with log.open("a") as file:
            file.write("3\n")
    assert said.getvalue() == "a: one\na: two\na: 3\n"


def wait_for(said: io.StringIO, text: str) -> None:
    for _ in range(500):
        if said.getvalue() == text:
            return
        time.sleep(0.02)
    raise AssertionError(said.getvalue())


def test_a_large_log_is_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotset.fleet.child._MOST_LOG_BYTES", 10)
    log = tmp_path / "log"
    child = Child("a", [*PYTHON, "print('x' * 20, flush=True); input()"], log)
    assert child.wait(30)
    child.trim_log()
    assert log.read_bytes() == b""
    assert signal.Signals.SIGKILL.name not in child.how_it_ended
