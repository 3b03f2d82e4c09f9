"""`hotset fleet`: what it starts, what it starts again, and that it leaves nothing.

Ray is started once, for the tests that stand in one order. What takes longer, such as many kills
under streams, is in benchmarks/fleet_lifecycle.py.
"""

import contextlib
import importlib.util
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from running_fleet import RunningFleet, wait_long
from servers import CHAT
from tiny_models import make_config, make_model
from tiny_tokenizer import VOCAB_SIZE

from hotset.cli import desk, front
from hotset.cli.fleet import command
from hotset.cli.running_fleet import Fleet, FleetFlags, _can_be_peers
from hotset.errors import ConfigError
from hotset.fleet.child import Child
from hotset.fleet.scaling import ScalingOptions
from hotset.options import Options

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    running = RunningFleet(tmp_path_factory.mktemp("fleet"), "--host-gib", "0.01")
    with contextlib.closing(running):
        running.wait_ready()
        yield running


@needs_ray
@pytest.mark.slow
def test_two_replicas_answer_behind_two_fronts_on_one_port(fleet: RunningFleet) -> None:
    assert [fleet.chat() for _ in range(6)] == [200] * 6
    assert len(fleet.of("-m hotset front")) == 2 and len(fleet.replicas()) == 2
    assert httpx.get(f"{fleet.url}/v1/files").json()["data"] == []  # of the desk
    status = httpx.get(f"{fleet.url}/status.json").json()
    assert len(status["fleet"]["replicas"]) == 2
    assert (fleet.folder / "f").stat().st_mode & 0o077 == 0
    assert len([path for path in (fleet.folder / "f").glob("*.peer") if path.is_socket()]) == 2


@needs_ray
@pytest.mark.slow
def test_a_head_that_is_killed_starts_again_and_no_replica_notices(fleet: RunningFleet) -> None:
    pids = {one.pid for one in fleet.replicas()}
    [head] = [one for one in fleet.of("ray.scripts.scripts start") if "--head" in one.cmdline()]
    [gcs] = fleet.of("gcs_server")
    head.kill()
    wait_long(lambda: not gcs.is_running() or gcs.status() == psutil.STATUS_ZOMBIE)
    assert fleet.chat() == 200
    wait_long(lambda: fleet.of("gcs_server"))
    wait_long(lambda: fleet.of("ray::ServeController"))
    assert fleet.chat() == 200
    assert {one.pid for one in fleet.replicas()} == pids


@needs_ray
@pytest.mark.slow
def test_a_killed_replica_is_replaced_while_the_other_serves(fleet: RunningFleet) -> None:
    victim, other = fleet.replicas()
    victim.kill()
    assert [fleet.chat() for _ in range(4)] == [200] * 4

    def is_replaced() -> bool:
        pids = {one.pid for one in fleet.replicas()}
        return len(pids) == 2 and victim.pid not in pids and other.pid in pids

    wait_long(is_replaced)


@needs_ray
@pytest.mark.many
def test_a_sighup_brings_other_weights_and_no_answer_is_of_both(fleet: RunningFleet) -> None:
    def answer() -> str:
        found = fleet.ask(max_tokens=60, ignore_eos=True, temperature=0)
        assert found.status_code == 200, found.text
        return str(found.json()["choices"][0]["message"]["content"])

    old, before = answer(), {one.pid for one in fleet.replicas()}
    other = fleet.folder / "other"
    make_model("llama", vocab_size=VOCAB_SIZE, seed=1).save_pretrained(other)
    for path in other.iterdir():  # a file that a replica may have open is not written to
        path.replace(fleet.model / path.name)
    fleet.process.send_signal(signal.SIGHUP)
    answers = []

    def is_renewed() -> bool:
        answers.append(answer())
        return before.isdisjoint(one.pid for one in fleet.replicas()) and answers[-1] != old

    wait_long(is_renewed)
    wait_long(lambda: len(fleet.replicas()) == 2)
    new = answers[-1]
    assert set(answers) == {old, new} and new != old
    assert {answer() for _ in range(6)} == {new}


@needs_ray
@pytest.mark.slow
def test_sigterm_lets_requests_end_and_leaves_nothing(fleet: RunningFleet) -> None:
    left = fleet.all()
    body = {**CHAT, "max_tokens": 60, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{fleet.url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        fleet.process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert fleet.process.wait(60) == 0, fleet.text()
    psutil.wait_procs(left, timeout=10)
    assert [one for one in left if one.is_running()] == []
    assert sorted(os.listdir(fleet.folder / "f")) == ["fleet.lock", "fronts", "secret"]


def test_replicas_are_peers_where_model_and_options_allow_it(tmp_path: Path) -> None:
    for family in ("llama", "qwen3_next"):
        make_config(family).save_pretrained(tmp_path / family)
    llama, states = str(tmp_path / "llama"), str(tmp_path / "qwen3_next")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\x00\xff")
    assert _can_be_peers(Options.of(model=llama, host_gib=1))
    assert _can_be_peers(Options.of(host_gib=1))  # the default model
    assert not _can_be_peers(Options.of(model=llama))
    assert not _can_be_peers(Options.of(model=llama, host_gib=1, tp=2))
    for name in (states, str(tmp_path / "a.gguf"), "nobody/knows-it"):
        assert not _can_be_peers(Options.of(model=name, host_gib=1))


def test_ranks_have_no_store_and_are_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server: Any = None  # which the store is not asked of
    told = FleetFlags(Options.of(tp=2), ScalingOptions(), 1, 1.0, "cost", server)
    assert Fleet(tmp_path, told)._start_store() is None
    assert (
        "share no KV blocks: a store takes those of one GPU, and each replica has 2"
        in capsys.readouterr().err
    )


def test_a_sighup_while_replicas_start_is_done_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server: Any = SimpleNamespace(drain_s=5)
    told = FleetFlags(Options.of(), ScalingOptions(), 1, 0.0, "cost", server)
    fleet = Fleet(tmp_path, told)
    generations = []

    class Ray:
        """Starts replicas in half a second."""

        address = "here"

        def deploy(self, path: Path) -> Child:
            generations.append(json.loads(path.read_text())["generation"])
            if generations[-1]:
                fleet._signals.put(signal.SIGTERM)
            return Child("a deployment", ["sleep", "0.5"], tmp_path / "log")

    fleet._ray, fleet._store = Ray(), None  # type: ignore[assignment]
    fleet._deploy()
    for _ in range(2):  # once is enough for both
        fleet._signals.put(signal.SIGHUP)
    fleet._watch()
    assert generations == [0, 1]
    said = capsys.readouterr().err
    assert "all replicas start again after the change under way" in said
    assert said.index("replicas serve") < said.index("starting all replicas again, one by one")


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(command, ["--directory", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'hotset[fleet]'" in str(result.exception)


@needs_ray
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "needs API keys"),
        (["--replicas", "0"], "--replicas is 0; expected 1 or more"),
        (["--files-gib", "0"], "files-gib is 0.0"),
        (["--peer-url", "unix:///a", "--remote-secret-file", "s"], "fetch from each other without"),
        (["--remote", "redis://h:1", "--remote-secret-file", "s"], "give --shared-gib 0, or leave"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    flags: list[str], says: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(command, ["--directory", str(tmp_path / "f"), *flags])
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)


@pytest.mark.parametrize(
    ("other", "flags", "says"),
    [
        (front, ["--rank", "2", "--fronts", "2"], "--rank is 2 and there are 2 fronts"),
        (front, ["--desk", "nowhere"], "address 'nowhere' is none; expected HOST:PORT"),
        (desk, ["--listen", "0.0.0.0:0"], "needs API keys"),
        (desk, ["--tls-key", "key.pem"], "--tls-key is given without --tls-cert"),
    ],
)
def test_fronts_and_desks_refuse_what_cannot_work(
    other: Any, flags: list[str], says: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(other.command, ["--directory", str(tmp_path / "f"), *flags])
    assert isinstance(result.exception, ConfigError)
    assert says in str(result.exception)
