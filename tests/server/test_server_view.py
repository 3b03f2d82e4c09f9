"""What a person sees of a server: `hotset top`, and a trace."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner
from openai.types import CompletionUsage
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from servers import CHAT, KEY, RunningServer, running_server, wait_for

from hotset.cli.top import command, fetch
from hotset.errors import ConfigError
from hotset.options import Options
from hotset.request import SamplingParams
from hotset.server.app import ServerConfig
from hotset.server.keys import Keys
from hotset.server.tracing import Tracer


@pytest.fixture
def server() -> Iterator[RunningServer]:
    keys = Keys()
    keys.read_text(f"alice:{KEY}")
    config = Options.of(hot_gib=0.001, host_gib=0.01, max_num_seqs=64, max_model_len=512)
    with running_server(config, ServerConfig(keys=keys)) as running:
        yield running


def test_top_shows_users_and_tiers_while_they_run(server: RunningServer) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    streams = [server.service.submit([5 + i, 6, 7] * 9, params) for i in range(12)]
    wait_for(lambda: server.service.metrics.preemptions > 0)  # more than the hot tier holds
    status = fetch(server.url, KEY)
    engine = status["engine"]
    assert engine["num_moving"] >= 1 and engine["num_parked"] + engine["num_waiting"] >= 1
    assert len(engine["users"]) == len(streams)
    device, host = engine["tiers"]
    assert device["capacity"] == len(device["cells"]) and "h" in device["cells"]
    assert host["used"] >= 1

    shown = CliRunner().invoke(command, ["--url", server.url, "--api-key", KEY, "--once"])
    assert shown.exit_code == 0, shown.output
    for text in (
        *("tiny", "hot: device", "warm: host memory", "moving", "TTFT", "device → host"),
        *("prefix hits", "forked", "resumed"),
    ):
        assert text in shown.output
    as_json = CliRunner().invoke(command, ["--url", server.url, "--api-key", KEY, "--json"])
    assert json.loads(as_json.output)["model"] == "tiny"
    for stream in streams:
        stream.abort()


def test_usages_add_up_to_the_counters_with_outputs_that_fork_and_requests_that_park(
    server: RunningServer,
) -> None:
    def counter(name: str) -> float:
        with server.http(headers={"authorization": f"Bearer {KEY}"}) as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"hotset:{name}"))

    def ask(prompt: list[int], **extra: object) -> CompletionUsage:
        with server.openai() as client:
            answer = client.completions.create(
                model="tiny", prompt=prompt, extra_body={"ignore_eos": True}, **extra
            )
        assert answer.usage is not None
        return answer.usage

    usages = [ask([9, 8, 7] * 33, n=4, max_tokens=2) for _ in range(2)]
    with ThreadPoolExecutor(12) as pool:
        prompts = [[5 + i, 6, 7] * 9 for i in range(12)]
        usages += pool.map(lambda prompt: ask(prompt, max_tokens=320), prompts)
    cached = []
    for usage in usages:
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens or 0)
        assert cached[-1] < usage.prompt_tokens
    assert cached[:2] == [0, 96]  # whole blocks of 99 tokens
    assert counter("prefix_cache_hits_total") == counter("cached_tokens_total") == sum(cached)
    assert counter("prefix_cache_queries_total") == sum(usage.prompt_tokens for usage in usages)
    assert counter("forked_tokens_total") == 2 * 3 * 98
    assert server.service.metrics.preemptions > 0 and counter("resumed_tokens_total") > 0
    totals = fetch(server.url, KEY)["totals"]
    assert totals["forked_tokens"] == 2 * 3 * 98


def test_top_says_in_one_line_why_it_shows_nothing(server: RunningServer) -> None:
    for url, key, says in (
        (server.url, None, "answers 401.*give --api-key"),
        (f"{server.url}/nothing", KEY, "answers 404"),
        ("http://127.0.0.1:9", KEY, "cannot be reached"),
        ("nonsense", KEY, "no hotset server"),
    ):
        with pytest.raises(ConfigError, match=says):
            fetch(url, key)


def test_a_request_is_one_span_of_the_callers_trace() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with running_server(server_config=ServerConfig(tracer=Tracer(provider))) as server:
        with server.http() as http:
            trace = "0af7651916cd43dd8448eb211c80319c"
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
            assert http.get("/health").status_code == 200
        wait_for(exporter.get_finished_spans)
        [span] = exporter.get_finished_spans()
    assert f"{span.context.trace_id:032x}" == trace
    assert span.name == "/v1/chat/completions" and span.attributes is not None
    assert span.attributes["gen_ai.usage.output_tokens"] == 6
    assert "cat" not in str(dict(span.attributes))  # nothing of what was asked


def test_the_dashboard_and_the_docs_name_metrics_that_there_are(server: RunningServer) -> None:
    server.service.metrics.faults["test"] += 1  # a family without a label has no line
    with server.openai() as client, server.http() as http:
        client.completions.create(model="tiny", prompt="the cat sat on the mat", max_tokens=3)
        text = http.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    there = set(re.findall(r"^# TYPE hotset:(\w+)", text, re.MULTILINE))
    there |= {f"{name}_bucket" for name in there}
    docs = Path(__file__).parents[2] / "docs"
    # Of a fleet: tests/server/test_fleet_view.py.
    asked = set(re.findall(r"hotset:(?!fleet_)(\w+)", (docs / "grafana.json").read_text()))
    assert asked and asked <= there, asked - there
    section = (docs / "server.md").read_text().split("## Metrics")[1].split("\n## ")[0]
    named = set(re.findall(r"`(?:hotset:)?([a-z]+_\w+?)[`{]", section))
    assert len(named) > 20 and named <= there, named - there


def test_chats_of_a_model_with_a_state_share_their_system_message_and_the_views_show_it() -> None:
    system = {"role": "system", "content": "Once upon a time there was a model " * 20}
    options = Options.of(hot_gib=0.004, host_gib=0.01, max_num_seqs=4, fetch_policy="fetch")
    with running_server(options, family="qwen3_5_text") as server, server.openai() as client:
        cached = []
        for text in ("where is the cat?", "and the dog?"):
            chat = [system, {"role": "user", "content": text}]
            answer = client.chat.completions.create(model="tiny", messages=chat, max_tokens=3)
            details = answer.usage and answer.usage.prompt_tokens_details
            cached.append(details and details.cached_tokens)
        assert cached[0] == 0 and cached[1] is not None and cached[1] >= 128
        assert server.service.keeps_states
        wait_for(lambda: server.service.metrics.spilled_states > 0)
        with server.http() as http:
            states = http.get("/status.json").json()["engine"]["states"]
            text = http.get("/metrics").text
        assert states["num_kept"] >= 2 and states["slot_bytes"] > 0
        wait_for(lambda: fetch(server.url, None)["engine"]["states"]["below"].get("host", 0) > 0)
        for line in ('state_hits_total{tier="device"} 1.0', "stateless_tokens_total 0.0"):
            assert f"hotset:{line}" in text
        shown = CliRunner().invoke(command, ["--url", server.url, "--once"])
        assert "states found" in shown.output and "1 device" in shown.output


def test_the_views_show_hot_requests_what_they_found_and_what_came_over_the_link() -> None:
    options = Options.of(
        hot_gib=0.0003,
        host_gib=0.01,
        block_size=4,
        max_num_seqs=8,
        max_model_len=160,
        hot_tokens=16,
        row_prefetch=2,
    )
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    with running_server(options, family="deepseek_v32") as server:
        streams = [server.service.submit([5 + i, 6, 7] * 20, params) for i in range(6)]
        wait_for(lambda: fetch(server.url, None)["totals"]["hot_guessed_right"] > 0)
        status = fetch(server.url, None)
        assert status["engine"]["num_hot"] > 0 and "h" in status["engine"]["users"]
        with server.http() as http:
            text = http.get("/metrics").text
        wide = {"COLUMNS": "160"}
        shown = CliRunner(env=wide).invoke(command, ["--url", server.url, "--once"])
        for stream in streams:
            stream.abort()
    assert re.search(r"^hotset:num_requests_hot [1-9]", text, re.MULTILINE)
    for name in ("turned_hot", "hot_hits", "hot_misses", "hot_guessed", "hot_guessed_right"):
        assert re.search(rf"^hotset:{name}_total [1-9]", text, re.MULTILINE), name
    assert re.search(r'^hotset:moved_bytes_total{.*"host".*"slots".*} [1-9]', text, re.MULTILINE)
    for line in (
        " hot",
        "host → slots",
        "selected tokens in slots",
        "tokens that came ahead: right",
    ):
        assert line in shown.output


def test_the_page_shows_all_of_the_status_and_nothing_else(server: RunningServer) -> None:
    with server.http(headers={"authorization": f"Bearer {KEY}"}) as http:
        status = http.get("/status.json").json()
        page = http.get("/").text
    engine, totals = status["engine"], status["totals"]
    named = [status, engine, engine["tiers"][0], status["rates"], status["latency_s"], totals]
    for key in [key for part in (*named, totals["experts"]) for key in part]:
        assert re.search(rf"\b{key}\b", page), f"{key} is not shown"
    for name, part in (("s", status), ("e", engine), ("t", totals), ("x", totals["experts"])):
        for key in re.findall(rf"\b{name}\.([a-z_]+)\b(?!\()", page):
            assert key in part or key == "length", f"there is no {name}.{key}"
