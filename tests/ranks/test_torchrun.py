"""Ranks that torchrun starts, on one host and two: how they meet, serve, fail and start again."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_models import make_model
from tiny_tokenizer import VOCAB_SIZE, make_tokenizer

from hotset.engine.load import load_on_ranks
from hotset.errors import ConfigError, EngineError
from hotset.options import Options
from hotset.ranks import torchrun
from hotset.ranks.torchrun import Meeting, Place, find_driver, is_other_rank, place

TWO_HOSTS = [Place(rank, 2, 0, 1, "127.0.0.1") for rank in (0, 1)]
ENGINE = ["--device", "cpu", "--gpus", "2", "--hot-gib", "0.01", "--max-model-len", "400"]


def put(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, num_local: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": num_local}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_knows_its_place_by_torchruns_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")  # of something else
    assert place() is None and not is_other_rank(2)
    put(monkeypatch, 1, 2, 1)
    here = place()
    assert here == Place(1, 2, 0, 1, "localhost")
    assert here.num_hosts == 2 and here.is_on_loopback
    assert is_other_rank(2)


@pytest.mark.parametrize(
    ("where", "gpus", "message"),
    [
        ((0, 4, 4), 1, "torchrun started 4 processes and one GPU is asked for; give --gpus 4"),
        ((1, 4, 4), 2, "torchrun started 4 processes and 2 GPUs are asked for; give --gpus 4"),
        ((0, 3, 2), 3, "torchrun started 2 of 3 processes on this host; give all hosts the same"),
    ],
)
def test_another_number_of_processes_is_refused(
    where: tuple[int, int, int], gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, *where)
    with pytest.raises(ConfigError, match=message):
        is_other_rank(gpus)


def test_a_script_on_another_rank_cannot_make_an_engine_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, 1, 2, 2)
    with pytest.raises(ConfigError, match="another rank than 0, which runs no engine of its own"):
        load_on_ranks(Options.of(tp=2, device="cpu"), lambda: None)  # type: ignore[arg-type]


class FakeStore:
    """A dictionary that is waited for."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, 30)
            return self._values[key].encode()


def test_ranks_meet_whatever_strangers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    with socket.create_server(("127.0.0.1", 0)) as gone:  # an earlier start's, which is over
        port = gone.getsockname()[1]
    store.set("hotset/driver", f"127.0.0.1 {port} {bytes(32).hex()}")
    found: dict[str, Any] = {}

    def come() -> None:
        found["driver"] = find_driver(store, TWO_HOSTS[1], 30)

    rank = threading.Thread(target=come)
    rank.start()
    meeting = Meeting(store, TWO_HOSTS[0])
    address, port_text, _ = store.get("hotset/driver").decode().split()
    strangers = [socket.create_connection((address, int(port_text))) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall((40).to_bytes(4, "big") + bytes(40))
    connections = meeting.wait(30)
    rank.join()
    assert list(connections) == [1] and connections[1][1] == socket.gethostname()
    connections[1][0].send_bytes(b"hello")
    assert found["driver"].recv_bytes() == b"hello"
    torchrun.cut(connections[1][0])
    with pytest.raises(EOFError):
        found["driver"].recv_bytes()
    for one in (*strangers, connections[1][0], found["driver"]):
        one.close()


def test_a_meeting_and_a_rank_give_up() -> None:
    store = FakeStore()
    with pytest.raises(EngineError, match=r"rank 1: it has not connected for 0\.1 seconds"):
        Meeting(store, TWO_HOSTS[0]).wait(0.1)
    with pytest.raises(EngineError, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1"):
        find_driver(store, TWO_HOSTS[1], 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("llama", vocab_size=VOCAB_SIZE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run_generate(folder: Path, *launcher: str, gpus: int) -> str:
    words = [*launcher, "-m", "hotset", "generate", "--model", str(folder), *ENGINE]
    words[words.index("--gpus") + 1] = str(gpus)
    words += ["--max-tokens", "12", "--raw", "--quiet", "The cat sat"]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.many
def test_two_processes_of_one_host_answer_as_one_does(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two = run_generate(folder, *launcher, "--nproc-per-node", "2", gpus=2)
    assert two == run_generate(folder, sys.executable, gpus=1) != ""


class Hosts:
    """Two agents of torchrun on this machine, each with one rank of a server."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.port, meeting = free_port(), free_port()
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        words += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
        words += ["--rdzv-endpoint", f"127.0.0.1:{meeting}", "--rdzv-id", str(meeting)]
        words += ["--max-restarts", "1", "--monitor-interval", "0.1"]
        words += ["-m", "hotset", "serve", "--port", str(self.port)]
        self._logs = [(logs / f"{n}.log").open("w") for n in range(2)]
        self.agents = [
            subprocess.Popen(
                [*words, "--model", str(folder), *ENGINE],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for log in self._logs
        ]

    def rank(self, number: int) -> int:
        """The process id of a rank: torchrun's child."""
        for agent in self.agents:
            for pid in children(agent.pid):
                with suppress(OSError):
                    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    if f"RANK={number}".encode() in environment:
                        return pid
        raise AssertionError(f"there is no rank {number}")

    def ask(self, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps({"prompt": "The cat sat", **body}).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=60)

    def answer(self) -> str:
        """The greedy answer, once the server serves."""
        deadline_s = time.monotonic() + 150
        while True:
            try:
                with self.ask(max_tokens=12, temperature=0) as response:
                    return str(json.load(response)["choices"][0]["text"])
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert time.monotonic() < deadline_s, "it does not serve"
                assert all(agent.poll() is None for agent in self.agents), "torchrun has ended"
                time.sleep(0.5)

    def close(self) -> None:
        """End both agents, which end the ranks."""
        for agent in self.agents:
            agent.send_signal(signal.SIGTERM)
        for agent in self.agents:
            agent.wait(60)
        for log in self._logs:
            log.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def children(pid: int) -> list[int]:
    """Of all threads of a process, and theirs."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in file.read_text().split()]
    return found + [each for one in found for each in children(one)]


def runs(pid: int) -> bool:
    """Whether a process is there, and has not ended with nobody to take its status."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def two_hosts(folder: Path, logs: Path) -> Iterator[Hosts]:
    hosts = Hosts(folder, logs)
    try:
        yield hosts
    finally:
        left = [pid for agent in hosts.agents for pid in children(agent.pid)]
        hosts.close()
        deadline_s = time.monotonic() + 20
        while any(map(runs, left)):
            assert time.monotonic() < deadline_s, left
            time.sleep(0.1)


@pytest.mark.many
def test_a_rank_that_dies_on_the_other_host_is_named_and_all_serve_again(
    folder: Path, tmp_path: Path
) -> None:
    with two_hosts(folder, tmp_path) as hosts:
        expected = hosts.answer()
        other = hosts.rank(1)
        with hosts.ask(max_tokens=350, ignore_eos=True, stream=True) as stream:
            stream.readline()  # it runs
            os.kill(other, signal.SIGKILL)
            text = stream.read().decode()
        assert f"rank 1: its process on {socket.gethostname()} has ended" in text
        assert hosts.answer() == expected
        assert hosts.rank(1) != other
