import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from fleets import LinkedReplica
from servers import CHAT

from hotset.cli.front import command
from hotset.errors import ConfigError
from hotset.fleet.directory import make_private


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_private(tmp_path / "fleet")
    return tmp_path / "fleet"


def serving_at(front: "subprocess.Popen[str]") -> str:
    """The address that a front says it serves at."""
    assert front.stderr is not None
    said = []
    for line in front.stderr:
        said.append(line)
        if line.startswith("serving tiny at "):
            return line.split()[3].removesuffix("/v1")
    raise AssertionError("".join(said))


def test_a_front_waits_for_a_replica_serves_by_it_and_ends_at_sigterm(folder: Path) -> None:
    words = [sys.executable, "-m", "hotset", "front", "--directory", str(folder), "--port", "0"]
    front = subprocess.Popen(
        [*words, "--reuse-port", "--route", "round-robin"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert front.stderr is not None
        assert "waiting for replicas" in front.stderr.readline()
        with contextlib.closing(LinkedReplica(folder, "r1")) as replica:
            url = serving_at(front)
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == CHAT["max_tokens"]
            assert httpx.get(f"{url}/v1/files").status_code == 404  # several fronts: at the desk
            assert replica.host.metrics.requests_finished.total() == 1
            front.send_signal(signal.SIGTERM)
            assert front.wait(60) == -signal.SIGTERM  # told on, as by `hotset serve`
    finally:
        front.kill()
        front.communicate()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines, which needs API keys"),
        (["--tls-ca", "/none/ca.pem"], "--tls-ca /none/ca.pem cannot be used"),
        (["--secret-file", "/none/secret"], "the fleet secret /none/secret cannot be read"),
        (["--rank", "2", "--fronts", "2"], "rank is 2 and there are 2 fronts; expected less"),
        (["--cors-origin", "chat.example.org"], "is no origin"),
    ],
)
def test_what_cannot_be_started_is_one_line(folder: Path, args: list[str], said: str) -> None:
    done = CliRunner().invoke(command, ["--directory", str(folder), *args])
    assert isinstance(done.exception, ConfigError)
    assert said in str(done.exception)
