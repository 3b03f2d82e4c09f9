import contextlib
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from replicas import ReplicaProcess

from hotset.cli.replica import command
from hotset.engine.messages import Report, Submit
from hotset.errors import ConfigError, EngineError
from hotset.fleet.directory import Directory
from hotset.fleet.link_host import LinkHost
from hotset.request import FinishReason, SamplingParams
from hotset.secret import own_secret

LONG = SamplingParams(max_tokens=500, ignore_eos=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fleet"


@pytest.fixture
def replica(folder: Path) -> Iterator[ReplicaProcess]:
    with contextlib.closing(ReplicaProcess(folder, "--id", "r1", "--drain-s", "0")) as made:
        yield made


_FRONT = """
import sys
from pathlib import Path
from hotset.fleet.link_host import LinkHost
from hotset.fleet.service import FleetService
from hotset.secret import read_secret
host = LinkHost(sys.argv[1], read_secret(Path(sys.argv[2])), print)
assert host.model.require_tokenizer().chat_template
host.close()
sys.exit("torch" in sys.modules)
"""


def check_that_only_the_engine_loads_torch(folder: Path, replica: ReplicaProcess) -> None:
    maps = psutil.Process(replica.process.pid).memory_maps()
    assert not [one.path for one in maps if "torch" in one.path]
    command = [sys.executable, "-c", _FRONT, replica.address, str(folder / "secret")]
    subprocess.run(command, check=True, timeout=60)


def test_a_replica_serves_fronts_and_at_sigterm_its_requests_move(
    folder: Path, replica: ReplicaProcess
) -> None:
    [entry] = Directory(folder).entries()
    assert (entry.replica_id, entry.model, entry.pid) == ("r1", "tiny", replica.process.pid)
    assert entry.address == replica.address == str(folder / "r1.sock")
    check_that_only_the_engine_loads_torch(folder, replica)
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    host = LinkHost(entry.address, own_secret(folder), reports.put)
    host.submit(Submit("a", [5, 6], LONG))
    while not (report := reports.get(timeout=30)).outputs:
        pass
    replica.process.send_signal(signal.SIGTERM)
    seen = []
    while report.failure is None:
        report = reports.get(timeout=30)
        seen.append(report)
    assert any(one.is_draining for one in seen)
    assert [one.outputs[-1].finish_reason for one in seen if one.outputs][-1] is FinishReason.MOVED
    assert "stopping; 1 requests have 0 s" in replica.end()
    assert replica.process.returncode == 0
    assert [path.name for path in folder.iterdir()] == ["secret"]


def test_a_replica_whose_engine_dies_says_so_to_its_fronts_and_ends(
    folder: Path, replica: ReplicaProcess
) -> None:
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    host = LinkHost(replica.address, own_secret(folder), reports.put)
    host.submit(Submit("a", [5, 6], LONG))
    [engine] = [
        child
        for child in psutil.Process(replica.process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    engine.kill()
    while (failure := reports.get(timeout=30).failure) is None:
        pass
    assert "signal 9" in failure
    while host.is_alive:
        time.sleep(0.01)
    assert reports.empty()  # one report with a failure is the last
    assert "error: the engine's process has been ended by signal 9" in replica.end()
    assert replica.process.returncode == 1


def test_a_killed_replica_ends_its_links_at_once_and_its_engine_goes_too(
    folder: Path, replica: ReplicaProcess
) -> None:
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    host = LinkHost(replica.address, own_secret(folder), reports.put)
    children = psutil.Process(replica.process.pid).children()
    host.submit(Submit("a", [5, 6], LONG))
    replica.process.kill()
    while (failure := reports.get(timeout=30).failure) is None:
        pass
    assert "the link to replica r1 has ended" in failure
    assert psutil.wait_procs(children, timeout=30)[1] == []
    with pytest.raises(EngineError, match="no link to the replica at"):
        LinkHost(replica.address, own_secret(folder), reports.put)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--id", "../x"], "id '../x' is none; expected letters"),
        (["--listen", "here"], "address 'here' is none; expected HOST:PORT"),
        (["--listen", "127.0.0.1:99999"], "expected HOST:PORT"),
        (["--listen", "/" + "x" * 200], "more than 107 bytes"),
        (["--listen", "192.0.2.1:0"], "cannot listen at 192.0.2.1:0"),
        (["--secret-file", "/none/secret"], "the fleet secret /none/secret cannot be read"),
        (["--tls-key", "key.pem"], "--tls-key is given without --tls-cert"),
        (["--tls-cert", "/none/cert.pem"], "--tls-cert /none/cert.pem cannot be used"),
    ],
)
def test_what_cannot_be_started_is_one_line(
    folder: Path, args: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hotset.server.logs.set_up", lambda *args: None)  # pytest has its own
    done = CliRunner().invoke(command, ["--directory", str(folder), *args])
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
