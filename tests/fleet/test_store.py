"""The store of one machine: bounded, reached by its user alone, gone with who started it."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from stores import needs_redis, read, remote, seal, write

from hotset.cli.fleet_revoke import command
from hotset.errors import TierError
from hotset.fleet.store import start_store
from hotset.memory.tier import CompletionStatus


@needs_redis
def test_a_store_shares_payloads_and_leaves_nothing_behind(tmp_path: Path) -> None:
    store = start_store(tmp_path, 32 * 2**20)
    assert store is not None and store.is_alive
    process = psutil.Process(store.process.pid)
    assert not process.net_connections("inet")
    socket = tmp_path / "store.sock"
    assert socket.stat().st_mode & 0o077 == 0
    tier = remote(store.url)
    assert write(tier, 1).status is CompletionStatus.OK
    assert read(tier, 1)[0].status is CompletionStatus.OK
    assert 1000 < tier.info.capacity_payloads < 32 * 2**20 // 8192
    tier.close()
    store.close()
    assert not store.is_alive
    assert {path.name for path in tmp_path.iterdir()} <= {"store.log"}
    store.close()


@needs_redis
def test_a_store_that_was_killed_starts_again_empty_and_at_the_same_place(tmp_path: Path) -> None:
    store = start_store(tmp_path, 32 * 2**20)
    assert store is not None
    tier = remote(store.url)
    assert write(tier, 1).status is CompletionStatus.OK
    tier.close()
    psutil.Process(store.process.pid).kill()
    assert store.process.wait(10)
    again = store.launch()
    until_s, tier = time.monotonic() + 10, remote(store.url)
    while tier.notes:  # it does not answer yet
        assert time.monotonic() < until_s
        time.sleep(0.01)
        tier.close()
        tier = remote(store.url)
    assert read(tier, 1)[0].fault == "missing"
    assert write(tier, 2).status is CompletionStatus.OK
    tier.close()
    again.end(5.0)


@needs_redis
def test_a_writer_is_revoked_in_the_store_of_a_directory(tmp_path: Path) -> None:
    store = start_store(tmp_path, 2**24)
    assert store is not None
    tier, other = remote(store.url), remote(store.url, by=seal(writer="another"))
    write(tier, 1)
    write(other, 2)
    done = CliRunner().invoke(command, ["another", "--directory", str(tmp_path)])
    assert done.output == f"{tmp_path / 'store.sock'}: blocks of another are not used any more\n"
    tier.close()
    tier = remote(store.url)
    assert [read(tier, number)[0].fault for number in (1, 2)] == [None, "revoked"]
    tier.close()
    other.close()
    store.close()


def test_revoking_where_there_is_no_store_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["another", "--directory", str(tmp_path)])
    assert isinstance(done.exception, TierError)
    assert str(done.exception).startswith(f"the store {tmp_path / 'store.sock'} cannot be told: ")


@needs_redis
def test_a_store_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from hotset.fleet.store import start_store
print(start_store(Path({str(tmp_path)!r}), 2**24).process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    pid, until_s = int(done.stdout), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_without_a_server_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert start_store(tmp_path, 2**30) is None


def test_a_server_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\necho starting\necho no memory is left\nexit 1\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("hotset.fleet.store._PROGRAMS", ("redis-server",))
    with pytest.raises(TierError, match="did not start: no memory is left"):
        start_store(tmp_path, 2**30)
    with pytest.raises(TierError, match="expected 16777216 or more"):
        start_store(tmp_path, 5)
