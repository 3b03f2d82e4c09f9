import contextlib
import json
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
from hotset.options import Options


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
    words += ["--reuse-port", "--route", "round-robin", "--drain-s", "0"]
    front = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert front.stderr is not None
        assert "waiting for replicas" in front.stderr.readline()
        options = Options.of(hot_gib=0.01, max_num_seqs=1)  # eight outputs take a while
        with contextlib.closing(LinkedReplica(folder, "r1", options)) as replica:
            url = serving_at(front)
            answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == CHAT["max_tokens"]
            assert httpx.get(f"{url}/v1/files").status_code == 404  # several fronts: at the desk
            assert replica.host.metrics.requests_finished.total() == 1
            body = {**CHAT, "max_tokens": 480, "n": 8, "ignore_eos": True, "stream": True}
            url = f"{url}/v1/chat/completions"
            with httpx.stream("POST", url, json=body, timeout=60) as stream:
                lines = (line for line in stream.iter_lines() if line)
                assert "choices" in next(lines)
                front.send_signal(signal.SIGTERM)
                *_, last = lines  # it was told that it ends, and why
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "not_available"
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
