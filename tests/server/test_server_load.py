"""Many users at once: none stalls, none holds up another, and a restart loses nothing it kept."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from click.testing import CliRunner
from forks import in_a_fork
from servers import CHAT, KEY, build, running_server, wait_for

from hotset.cli.serve import command
from hotset.engine import service as service_module
from hotset.engine.service import EngineService
from hotset.errors import DrainingError, OverloadedError
from hotset.fleet.allowance import KeyLimits
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.server.app import ServerConfig
from hotset.server.errors import ApiError
from hotset.server.keys import Keys, Tenant
from hotset.server.limits import Limits

ENDLESS = {**CHAT, "max_tokens": 480, "ignore_eos": True, "stream": True}


def test_256_streams_at_once_all_end_whole_beside_1000_idle_connections() -> None:
    users, tokens = 256, 12

    async def ask(http: httpx.AsyncClient, i: int) -> list[str]:
        body = {
            "messages": [{"role": "user", "content": f"user {i} says the cat"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        lines = []
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line:
                    lines.append(line.removeprefix("data: "))
        return lines

    async def ask_all(url: str) -> list[list[str]]:
        limits = httpx.Limits(max_connections=users)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as http:
            return await asyncio.gather(*(ask(http, i) for i in range(users)))

    # The hot tier holds a part of the users: the others are parked in host memory meanwhile.
    config = Options.of(hot_gib=0.0012, host_gib=0.05, max_num_seqs=users, max_model_len=128)
    with running_server(config) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        answers = asyncio.run(ask_all(server.url))
        for lines in answers:
            assert lines[-1] == "[DONE]"
            assert json.loads(lines[-2])["usage"]["completion_tokens"] == tokens
            assert not any("error" in line for line in lines)
        with server.http() as http:
            assert http.get("/health").status_code == 200
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert idle[0].recv(64).startswith(b"HTTP/1.1 200")  # it waited, and still works
        for connection in idle:
            connection.close()
        status = server.service.status().result(60)
        assert not set(status.tiers[0].cells) & set("hs")  # nobody's blocks are left behind


def test_a_reader_that_does_not_read_holds_up_nobody() -> None:
    with running_server() as server:
        body = json.dumps({**ENDLESS, "logprobs": True, "top_logprobs": 20}).encode()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
        slow.sendall(head % len(body) + body)
        # It reads nothing, and yet the engine comes to the end of its request ...
        wait_for(lambda: server.service.metrics.requests_finished["length"] == 1)
        with server.http() as http:
            assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        # ... and what it did not read is there when it does.
        received = b""
        while b"data: [DONE]" not in received:
            chunk = slow.recv(65536)
            assert chunk, "the stream was dropped"
            received += chunk
        slow.close()
        pieces = [json.loads(line[6:]) for line in received.split(b"\n") if line[:7] == b"data: {"]
        entries = [len(p["choices"][0]["logprobs"]["content"]) for p in pieces]
        assert sum(entries) == 480


def test_what_waits_is_bounded_and_refused_with_a_time_to_come_back() -> None:
    config = Options.of(hot_gib=0.01, max_num_seqs=1, max_num_batched_tokens=8)
    limits = Limits(max_queue=2)
    with running_server(config, ServerConfig(limits=limits)) as server, server.http() as http:
        params = SamplingParams(max_tokens=480, ignore_eos=True)
        # Until the engine has all it takes ahead, and the queue before it is full too.
        streams = []
        with pytest.raises(OverloadedError):
            for _ in range(1000):
                streams.append(server.service.submit([5, 6], params, queue_limit=2))
                server.service.status().result(60)  # it has come to the engine's thread
        response = http.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["code"] == "queue_full"
        for stream in streams:
            stream.abort()
        wait_for(lambda: server.service.num_open == 0)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_tenant_with_few_requests_is_not_behind_one_with_many() -> None:
    config = Options.of(hot_gib=0.01, max_num_seqs=1, max_num_batched_tokens=8)
    with running_server(config) as server:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        order: list[str] = []

        def ask(tenant: str) -> threading.Thread:
            stream = server.service.submit([5, 6, 7], params, tenant=tenant)

            def read() -> None:
                for _ in stream:
                    pass
                order.append(tenant)

            thread = threading.Thread(target=read)
            thread.start()
            return thread

        threads = [ask("many") for _ in range(60)]
        threads += [ask("few") for _ in range(3)]
        for thread in threads:
            thread.join(60)
        assert len(order) == 63
        # The engine had a few of the many ahead; from there on they take turns.
        assert order.index("few") < 30
        assert order[-1] == "many"


def test_a_request_waits_for_its_deadline_at_most_also_in_the_queue() -> None:
    config = Options.of(hot_gib=0.01, max_num_seqs=1)
    with running_server(config) as server, server.http() as http:
        endless = SamplingParams(max_tokens=500, ignore_eos=True)
        streams = [server.service.submit([5], endless) for _ in range(12)]
        response = http.post("/v1/chat/completions", json={**CHAT, "timeout_s": 0.02})
        assert response.status_code == 504
        for stream in streams:
            stream.abort()


def test_a_stream_that_waits_says_so_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotset.server.generate.KEEP_ALIVE_S", 0.02)
    config = Options.of(hot_gib=0.01, max_num_seqs=1)
    with running_server(config) as server, server.http() as http:
        endless = SamplingParams(max_tokens=500, ignore_eos=True)
        before = server.service.submit([5], endless)
        lines: list[str] = []
        with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
            for line in response.iter_lines():
                lines.append(line)
                before.abort()  # no sooner than the first line came
        assert lines[0] == ": waiting"
        assert lines[-2] == "data: [DONE]"


def test_a_drained_server_ends_what_runs_and_takes_no_more() -> None:
    with running_server(drain_s=60) as server:
        lines: list[str] = []
        started = threading.Event()

        def read() -> None:
            with (
                server.http() as http,
                http.stream("POST", "/v1/chat/completions", json=ENDLESS) as response,
            ):
                for line in response.iter_lines():
                    lines.append(line)
                    started.set()

        with server.http() as kept:
            assert kept.get("/health").status_code == 200
            thread = threading.Thread(target=read)
            thread.start()
            assert started.wait(60)
            server.api.drain()
            assert kept.get("/health").status_code == 503
            assert kept.post("/v1/chat/completions", json=CHAT).status_code == 503
            server.stop()
        thread.join(60)
        assert "data: [DONE]" in lines


def test_an_engine_process_that_is_killed_ends_every_stream_with_the_reason() -> None:
    with running_server(own_process=True) as server, server.http() as http:
        children = psutil.Process().children()  # spawning leaves a tracker of its own too
        [engine] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert http.post("/v1/chat/completions", json=CHAT).json()["usage"]["total_tokens"] > 6
        wait_for(lambda: server.service.metrics.output_tokens == 6)  # the counters came too
        for call in (server.service.close, server.service.submit([5], SamplingParams()).abort):
            assert in_a_fork(call) == "returned"  # and the engine goes on
        stream = server.service.submit([5, 6], SamplingParams(max_tokens=500, ignore_eos=True))
        server.service._host.drain(3600.0)  # by then it is gone
        with pytest.raises(DrainingError, match="about to end"):
            server.service.submit([5], SamplingParams())
        engine.kill()
        *_, last = list(stream)
        assert last.error is not None and "signal 9" in last.error
        assert http.get("/health").status_code == 503
        refused = http.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503 and "signal 9" in refused.text


SERVE = """
import functools, sys
sys.path.insert(0, {tests!r})
import tiny_engine
from hotset.engine import service
from hotset.server import app
app.EngineService = functools.partial(service.EngineService, build=tiny_engine.build)
service.EngineService = app.EngineService
from hotset.cli import main
main()
"""


def serve_command(*args: str) -> list[str]:
    """`hotset serve` over the tiny model."""
    code = SERVE.format(tests=str(Path(__file__).parents[1]))
    return [sys.executable, "-c", code, "serve", "--port", "0", "--no-files", *args]


def start(*args: str) -> tuple["subprocess.Popen[str]", str, list[str]]:
    """A server in a process; its address, and what it says."""
    process = subprocess.Popen(serve_command(*args), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("status page "):
            return process, line.split()[2].removesuffix("/,"), said
    raise AssertionError("".join(said))


def test_a_dry_run_says_what_would_go_where_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "EngineService", partial(EngineService, build=build))
    monkeypatch.setattr("hotset.server.logs.set_up", lambda *args: None)  # pytest has its own
    config = tmp_path / "serve.toml"
    config.write_text("port = 0\nhot-gib = 0.001\nhost_gib = 0.5\n")
    args = ["--config", str(config), "--host-gib", "0.01", "--dry-run"]
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert "would serve tiny at http://127.0.0.1:" in done.stdout
    [host] = [line.split() for line in done.stdout.splitlines() if "host tier" in line]
    assert host[3] == "0.010"  # the command line wins over the file


@pytest.mark.parametrize("has_template", [True, False])
def test_a_missing_chat_template_is_said_at_load_and_once(
    monkeypatch: pytest.MonkeyPatch, has_template: bool
) -> None:
    def build_plain(config: Options) -> Any:
        engine, model = build(config)
        if not has_template:
            model.require_tokenizer().chat_template = None
        return engine, model

    monkeypatch.setattr(service_module, "EngineService", partial(EngineService, build=build_plain))
    monkeypatch.setattr("hotset.server.logs.set_up", lambda *args: None)  # pytest has its own
    args = ["--port", "0", "--hot-gib", "0.001", "--dry-run"]
    done = CliRunner().invoke(command, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stderr.count("model 'tiny' has no chat template") == (not has_template)


def blocks_on_disk(http: httpx.Client, at_least: int) -> bool:
    """Whether this run has written so many blocks."""
    status = http.get("/status.json").json()
    written = status["totals"]["moved_bytes"].get("host>disk", 0)
    return bool(written >= at_least * status["engine"]["tiers"][0]["block_bytes"])


def test_a_restart_finds_the_disk_tier_warm_after_sigterm_and_after_sigkill(
    tmp_path: Path,
) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(
        f'hot_gib = 0.001\nhost-gib = 0.01\ndisk_gib = 0.05\ndisk-path = "{tmp_path}/kv"\n'
        'log_format = "json"\nfetch-policy = "fetch"\n'
    )
    prompts = ["the cat sat on the mat and the dog " * 8, "once upon a time there was a model " * 8]
    answers: list[tuple[str, int]] = []
    said: list[str] = []

    def ask(http: httpx.Client, prompt: str) -> int:
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
        answer = http.post("/v1/completions", json=body).json()
        usage = answer["usage"]
        cached_tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
        answers.append((answer["choices"][0]["text"], cached_tokens))
        return int(usage["prompt_tokens"]) // 16

    # One more prompt a run; each run but the first knows those of the runs before.
    for end, known in ((signal.SIGTERM, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 2)):
        process, url, lines = start("--config", str(config))
        try:
            with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
                num_blocks = [ask(http, prompt) for prompt in prompts[: known + 1]]
                if end is signal.SIGKILL:  # then only what is written already is kept
                    wait_for(partial(blocks_on_disk, http, num_blocks[-1]))
        finally:
            process.send_signal(end)
            assert process.stderr is not None
            said += [*lines, *process.stderr]
            process.stderr.close()
            process.wait(60)
    (cat, none), (cat_again, found), (once, new), (cat_at_last, kept), (once_again, written) = (
        answers
    )
    assert none == new == 0 and found > 0 and kept > 0 and written > 0, said
    assert cat == cat_again == cat_at_last and once == once_again
    entry = next(json.loads(line) for line in said if "/v1/completions" in line)
    assert entry["output_tokens"] == 4 and entry["status"] == 200 and entry["request_id"]


@pytest.mark.parametrize("drain_s", ["0", "60"])
def test_requests_that_a_stop_ends_say_so_and_the_log_has_no_traceback(drain_s: str) -> None:
    """With 60 s to go on a second signal ends them."""
    process, url, _ = start("--drain-s", drain_s, "--hot-gib", "0.01", "--log-level", "warning")
    assert process.stderr is not None
    body = {"prompt": "the cat", "max_tokens": 500, "n": 8, "stream": True, "ignore_eos": True}
    try:
        with (
            httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            lines = (line for line in answer.iter_lines() if line)
            assert "choices" in next(lines)
            process.send_signal(signal.SIGTERM)
            assert process.stderr.readline() == f"stopping; 1 requests have {drain_s} s\n"
            if drain_s != "0":
                process.send_signal(signal.SIGTERM)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "not_available"
    finally:
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        process.stderr.close()
        process.wait(60)
    assert said == ""


def test_a_signal_while_the_model_loads_ends_the_server_at_once() -> None:
    process = subprocess.Popen(serve_command(), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().endswith("loading the model\n")
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 130
    assert said == "interrupted\n"


def test_an_allowance_refills_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    keys = Keys()
    keys.add(KEY, Tenant("a", KeyLimits(tokens_per_minute=60)))
    tenant: Any = keys.find(KEY)
    with tenant.request():
        tenant.charge(90)
    with (
        pytest.raises(ApiError, match="used its tokens of this minute") as refused,
        tenant.request(),
    ):
        pass
    assert refused.value.headers == {"Retry-After": "31"}
    now += 31.5
    with tenant.request():
        pass
