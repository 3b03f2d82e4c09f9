"""The bench drives real engines and a real server over a tiny model."""

import gc
import json
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from click.testing import CliRunner
from servers import running_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hotset.bench.arms import check_arms, order_of, parse_arms
from hotset.bench.campaign import Order, Target, run_bench
from hotset.bench.presets import PRESETS
from hotset.bench.result import BenchResult
from hotset.bench.runs import RunOptions, Say
from hotset.bench.workload import Spec
from hotset.cli import cli
from hotset.engine.engine import Engine
from hotset.errors import ConfigError, EngineError, HotsetError
from hotset.model.dummy import load_dummy
from hotset.options import Options

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
SPEC = Spec("multiturn", users=6, turns=3, first_tokens=64, new_tokens=16, output_tokens=8)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with a config and nothing else."""
    torch.set_num_threads(1)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path / "tiny")


def quiet() -> tuple[Say, list[str]]:
    lines: list[str] = []
    return Say(lines.append, lambda make: lines.append(make())), lines


def run(model: str | None, arms: list[str], spec: Spec = SPEC, **options: Any) -> BenchResult:
    """The bench over a tiny model; fetching, as recomputing it would be faster."""
    config = Options.of(model=model, device="cpu", fetch_policy="fetch")
    order = Order(
        spec=spec,
        config=options.pop("config", config),
        dummy_weights=True,
        arms=arms,
        repeats=options.pop("repeats", 1),
        target=options.pop("target", None),
        options=RunOptions(**options),
    )
    return run_bench(order, quiet()[0])


def test_all_arms_give_the_same_answers_and_tiers_compute_less(tiny: str) -> None:
    result = run(tiny, ["hot", "host", "host+disk"], verify=True, hardware="h200")
    assert result.failures == []
    assert result.verification is not None
    assert result.verification["differing"] == 0
    assert [run["compared"] for run in result.verification["runs"]] == [18, 18]
    hot, host, disk = result.runs
    for one in result.runs:
        assert one.is_complete
        assert (one.requests, one.output_tokens) == (18, 18 * 8)
        assert one.prompt_tokens == 6 * (64 + 88 + 112)
        assert len(one.ttft_by_turn_s) == 3
        assert one.engine["steps"] > 0 and one.engine["mean_step_ms"] > 0
        # Every token computed once at least, but the last one of a user's last answer.
        assert one.engine["computed_tokens"] >= 6 * (64 + 2 * 16 + 3 * 8) - 6
        assert one.prediction is not None and one.prediction["wall_s"] > 0
        assert one.samples["t_s"][-1] == pytest.approx(one.wall_s, abs=0.5)
        assert "KV, hot tier" in one.budget_report
    assert hot.engine["moved_bytes"] == {}
    assert host.engine["moved_bytes"]["host>device"] > 0
    assert disk.engine["moved_bytes"]["host>disk"] > 0
    assert host.engine["computed_tokens"] < hot.engine["computed_tokens"]
    assert max(host.samples["host_used"]) > 0 == max(hot.samples["host_used"])
    assert result.verdict.startswith(("Tiering", "No verdict"))
    json.dumps(result.as_dict())


MOE = {
    **TINY,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@pytest.mark.parametrize(
    "sizes",
    [
        {"expert_slots": 3, "expert_plan": "cache"},
        {"hot_gib": 0.0005, "expert_plan": "cache", "expected_users": 2},
        {},
    ],
    ids=str,
)
def test_experts_in_host_memory_are_predicted_and_answer_alike(
    sizes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    config = Options.of(model=str(tmp_path), device="cpu", max_num_seqs=8, **sizes)
    arms = ["hot"] if sizes else ["hot", "host"]  # without sizes both have all experts
    result = run(str(tmp_path), arms, config=config, hardware="h200")
    assert result.failures == []
    for one in result.runs:
        assert one.is_complete and one.prediction is not None
        if not sizes:
            assert "at_hit_rate" not in one.prediction
            continue
        hits, misses = one.engine["expert_hits"], one.engine["expert_misses"]
        assert hits > 0 and misses > 0
        at_hit_rate = one.prediction["at_hit_rate"]
        assert at_hit_rate["hit_rate"] == hits / (hits + misses)
        assert at_hit_rate["wall_s"] > 0 and one.prediction["wall_s"] > 0


def test_an_arm_leaves_no_engine_behind(tiny: str) -> None:
    run(tiny, ["hot", "host"])
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Engine]


def test_arms_rotate_from_round_to_round() -> None:
    assert order_of(["hot", "host", "host+disk"], 0) == ["hot", "host", "host+disk"]
    assert order_of(["hot", "host", "host+disk"], 1) == ["host", "host+disk", "hot"]
    assert parse_arms("hot, host") == ["hot", "host"]
    for wrong in ("", "warm", "hot,hot"):
        with pytest.raises(ConfigError, match=r"^arms is"):
            parse_arms(wrong)


@pytest.mark.parametrize(
    "spec",
    [
        Spec("unshared", users=4, first_tokens=48, output_tokens=6),
        Spec("pressure", users=6, turns=2, first_tokens=48, output_tokens=24),
        Spec("shared-prefix", users=4, first_tokens=8, prefix_tokens=96, output_tokens=4),
        Spec("multiturn", users=3, turns=2, first_tokens=16, output_tokens=4, rate_per_s=50.0),
    ],
    ids=lambda spec: spec.workload + ("" if spec.rate_per_s is None else " by rate"),
)
def test_each_workload_runs_to_its_end_with_and_without_tiers(tiny: str, spec: Spec) -> None:
    result = run(tiny, ["hot", "host"], spec, verify=True)
    assert result.failures == []
    assert all(one.is_complete for one in result.runs)
    assert result.verification is not None and result.verification["differing"] == 0


def test_a_shared_prefix_comes_from_the_host_once_for_all_requests(tiny: str) -> None:
    spec = Spec("shared-prefix", users=4, first_tokens=8, prefix_tokens=96, output_tokens=4)
    hot, host = run(tiny, ["hot", "host"], spec).runs
    block_bytes = 16 * host.sizes["kv_bytes_per_token"]
    assert host.engine["moved_bytes"]["host>device"] == 96 // 16 * block_bytes
    assert host.engine["computed_tokens"] == 4 * (8 + 4 - 1)
    assert hot.engine["computed_tokens"] >= 96 + 4 * (8 + 4 - 1)


def test_a_trace_is_played_at_its_times(tiny: str, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1500, "output_length": 40, "hash_ids": [0, 1, 2]},
        {"timestamp": 400, "input_length": 1500, "output_length": 40, "hash_ids": [0, 1, 3]},
        {"timestamp": 500, "input_length": 90_000, "output_length": 1, "hash_ids": [0] * 176},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    spec = Spec("trace", trace=trace, length_scale=0.125, time_scale=0.5)
    (one,) = run(tiny, ["host"], spec).runs
    assert one.requests == 2
    assert one.wall_s >= 0.2
    assert one.engine["cached_tokens"]["device"] >= 112


def test_an_arm_that_cannot_start_does_not_keep_the_others_from_running(tiny: str) -> None:
    config = Options.of(model=tiny, device="cpu", host_gib=10_000.0)
    result = run(tiny, ["hot", "host"], config=config)
    assert [one.arm for one in result.runs] == ["hot"]
    (failure,) = result.failures
    assert failure.arm == "host" and "less host_gib" in failure.reason
    with pytest.raises(EngineError, match="no run ended; host: "):
        run(tiny, ["host"], config=config)


def test_a_run_ends_at_its_time_limit_with_what_it_has(tiny: str) -> None:
    spec = Spec("unshared", users=8, turns=200, first_tokens=64, output_tokens=64)
    (one,) = run(tiny, ["hot"], spec, max_s=0.5).runs
    assert not one.is_complete
    assert one.requests < 1600
    assert "broken off" in one.notes[0]


def test_a_profile_names_functions_and_operators(tiny: str) -> None:
    say, lines = quiet()
    config = Options.of(model=tiny, device="cpu")
    run_bench(Order(SPEC, config, True, ["hot"], 1, RunOptions(profile_steps=3)), say)
    (report,) = [line for line in lines if "profile\n" in line]
    assert "function calls" in report and "site-packages/torch" in report
    assert "engine.py" in report and "aten::mul" in report
    assert "operators of torch ran" in report


def test_the_same_work_goes_to_a_server_over_http() -> None:
    config = Options.of(hot_gib=0.01)
    with running_server(config) as server:
        target = Target(server.url, vocab_size=512)
        result = run(None, [], SPEC, target=target)
        assert result.failures == []
        (one,) = result.runs
        assert one.first_error is None and one.is_complete
        assert (one.requests, one.output_tokens) == (18, 18 * 8)
        assert one.prompt_tokens == 6 * (64 + 88 + 112)
        assert one.latencies["ttft_s"]["mean"] > 0
        assert one.arm == f"{server.url}/v1"
        assert not any("no token ids" in note for note in one.notes)
        # The server counted the same work, beside the warm-up.
        assert server.service.metrics.prompt_tokens >= one.prompt_tokens
        with pytest.raises(ConfigError, match="vocabulary of 'tiny' is not known"):
            run(None, [], SPEC, target=Target(server.url))
        wrong = Spec("unshared", users=2, first_tokens=600, output_tokens=1)
        (refused,) = run(None, [], wrong, target=target).runs
        assert refused.failed == 2 and not refused.is_complete
        assert "HTTP 400" in (refused.first_error or "")
    with pytest.raises(HotsetError, match="cannot be reached"):
        run(None, [], SPEC, target=target)


def test_answers_are_sent_back_where_a_server_returns_their_ids() -> None:
    """As vLLM does with `return_token_ids`."""
    bodies: list[dict[str, Any]] = []

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "org/llama-3.1-8b"}]})

    async def completions(request: Request) -> Response:
        body = await request.json()
        ids = [7000 + i for i in range(body["max_tokens"])]
        if not body["stream"]:
            return JSONResponse({"choices": [{"text": "x", "token_ids": ids}]})
        bodies.append(body)
        events: list[dict[str, Any]] = [
            {"choices": [{"text": "", "token_ids": [token]}]} for token in ids
        ]
        events.append({"choices": [], "usage": {"completion_tokens": len(ids)}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return Response("".join([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

    app = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/completions", completions, methods=["POST"]),
        ]
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        (one,) = run(None, [], SPEC, target=Target(url)).runs
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert one.is_complete
    assert not any("no token ids" in note for note in one.notes)
    by_length = sorted(bodies[-18:], key=lambda body: len(body["prompt"]))
    assert [len(body["prompt"]) for body in by_length] == [64] * 6 + [88] * 6 + [112] * 6
    first = {tuple(body["prompt"]) for body in by_length[:6]}
    for body in by_length[6:]:
        assert tuple(body["prompt"][:64]) in first
        assert body["prompt"][64:72] == list(range(7000, 7008))


def test_the_command_writes_table_json_and_page(tiny: str, tmp_path: Path) -> None:
    out, html = tmp_path / "b.json", tmp_path / "b.html"
    words = ["bench", "multiturn", "--model", tiny, "--dummy-weights", "--users", "3"]
    words += ["--turns", "2", "--first-tokens", "32", "--new-tokens", "8", "--output-tokens", "4"]
    words += ["--device", "cpu", "--verify", "--repeats", "2"]
    shown = CliRunner().invoke(cli, [*words, "--out", str(out), "--html", str(html)])
    assert shown.exit_code == 0, shown.output
    assert "multiturn: 3 users, 2 turns" in shown.stdout
    assert "verified against hot: " in shown.stdout
    assert "KV, host tier" in shown.stderr
    saved = json.loads(out.read_text())
    assert len(saved["runs"]) == 4
    assert saved["asked"]["workload"]["seed"] == 1000
    assert saved["machine"]["versions"]["torch"] == torch.__version__
    assert html.read_text().startswith("<!doctype html>")
    as_json = CliRunner().invoke(cli, [*words, "--arms", "hot", "--json"])
    assert json.loads(as_json.stdout)["runs"][0]["requests"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a workload"),
        (["multiturn", "--preset", "C6"], "not both"),
        (["trace"], "needs a file"),
        (["unshared", "x.jsonl"], "takes no file"),
        (["trace", "/nosuch.jsonl", "--arms", "hot"], "cannot be read"),
        (["unshared", "--users", "0"], "--users is 0; expected 1 or more"),
        (["unshared", "--rate", "0"], "--rate is 0.0"),
        (["unshared", "--arms", "warm"], "'warm' is unknown"),
        (["unshared", "--hardware", "nosuch"], "hardware 'nosuch' is unknown"),
        (["unshared", "--model", "nosuch"], "model 'nosuch' is neither bundled"),
        (["unshared", "--first-tokens", "9000"], "serve 512"),
        (["unshared", "--out", "/nosuch/b.json"], "is no folder one may write to"),
        (["unshared", "--against", "ftp://x"], "expected http://HOST:PORT"),
        (["unshared", "--max-s", "0"], "--max-s is 0.0"),
    ],
)
def test_a_mistake_is_one_line(tiny: str, words: list[str], message: str) -> None:
    model = [] if "--model" in words else ["--model", tiny]
    shown = CliRunner().invoke(cli, ["bench", *words, *model, "--dummy-weights", "--device", "cpu"])
    assert shown.exit_code != 0
    error = shown.exception
    assert isinstance(error, HotsetError), shown.output
    assert message in str(error)
    assert "\n" not in str(error)


def test_a_dummy_model_has_the_buffers_and_scale_of_one_built_normally(tiny: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = load_dummy(tiny, device="cpu", dtype="bfloat16")
    normal = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY), dtype=torch.bfloat16)
    buffers, expected = dict(loaded.model.named_buffers()), dict(normal.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name]), name
    for (name, one), (_, other) in zip(
        loaded.model.named_parameters(), normal.named_parameters(), strict=True
    ):
        assert one.dtype == torch.bfloat16 and not one.requires_grad
        if one.ndim > 1:
            assert one.float().std() == pytest.approx(other.float().std().item(), rel=0.1), name
        else:
            assert torch.equal(one, other), name
    assert loaded.max_model_len == 512 and loaded.tokenizer is None


def test_equal_seeds_make_equal_dummy_weights(tiny: str) -> None:
    before = torch.random.get_rng_state()
    one, two, three = (
        load_dummy(tiny, device="cpu", dtype="auto", seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [loaded.model.lm_head.weight for loaded in (one, two, three)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert one.fingerprint == two.fingerprint != three.fingerprint


def test_a_dummy_larger_than_the_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(HotsetError, match=r"deepseek-v3 .* GB and .* GB are free on cpu"):
        load_dummy("deepseek-v3", device="cpu", dtype="auto")


def test_a_dummy_of_an_unknown_or_unusable_config_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(HotsetError, match="neither bundled"):
        load_dummy("nosuch", device="cpu", dtype="auto")
    config = tmp_path / "config.json"
    for text, reason in (
        ('{"model_type": "nosuch"}', "cannot make a model of"),
        ('{"model_type": "t5"}', "is an encoder-decoder"),
        ("[]", "cannot make a model of"),
    ):
        config.write_text(text)
        with pytest.raises(HotsetError, match=reason) as caught:
            load_dummy(str(config), device="cpu", dtype="auto")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def d_small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words for preset D-small, on its model with two layers in place of six."""
    preset = PRESETS["D-small"]
    shape = json.loads(Path(preset.model).read_text("utf-8")) | {"num_hidden_layers": 2}
    model = tmp_path_factory.mktemp("shape") / "shallow.json"
    model.write_text(json.dumps(shape), "utf-8")
    words = "bench --preset D-small --dummy-weights --users 4 --first-tokens 16 --output-tokens 6"
    return [*words.split(), "--model", str(model)]


@pytest.mark.parametrize("arms", ["resident,experts", "experts,resident,hot"])
def test_experts_resident_and_buffered_are_compared_in_one_call(
    arms: str, d_small: list[str]
) -> None:
    """Each arm twice: experts move to the host, all to the device, and back."""
    torch.set_num_threads(1)
    words = [*d_small, "--arms", arms, "--repeats", "2", "--verify", "--router-skew", "0.45"]
    words += ["--expert-slots", "32", "--expert-plan", "cache", "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["verification"]["differing"] == 0
    assert all(run["compared"] == 4 for run in data["verification"]["runs"])
    assert data["asked"]["workload"]["temperature"] == 1.0
    assert data["asked"]["router_skew"] == 0.45
    buffered = [run for run in data["runs"] if run["arm"] != "resident"]
    for run in data["runs"]:
        engine, sizes = run["engine"], run["sizes"]
        if run["arm"] == "resident":
            assert engine["expert_hit_rate"] is None and engine["expert_bytes"] == 0
            assert sizes["experts_host_bytes"] == 0
            continue
        assert 0 < engine["expert_hit_rate"] < 1
        payload = sizes["experts_host_bytes"] // (2 * 128)
        assert engine["expert_bytes"] == engine["expert_misses"] * payload
        assert sizes["experts_device_bytes"] == 2 * 32 * payload
    # The same work from the same start: `hot` has the experts as the options say, too.
    assert len({run["engine"]["expert_misses"] for run in buffered}) == 1


def test_sampled_answers_are_the_same_in_each_arm_and_not_the_greedy_ones(tiny: str) -> None:
    spec = Spec("multiturn", users=3, turns=2, first_tokens=24, output_tokens=8, temperature=1.0)
    sampled = run(tiny, ["hot", "host"], spec, verify=True)
    assert sampled.verification is not None and sampled.verification["differing"] == 0
    greedy = run(tiny, ["hot"], replace(spec, temperature=0.0), verify=True)
    assert sampled.runs[0].outputs != greedy.runs[0].outputs
    other = run(tiny, ["hot"], replace(spec, seed=7), verify=True)
    assert sampled.runs[0].outputs != other.runs[0].outputs


def test_arms_follow_from_the_expert_options_where_none_are_named(d_small: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*d_small, "--expert-slots", "16", "--json"])
    assert [run["arm"] for run in json.loads(shown.stdout)["runs"]] == ["resident", "experts"]
    shown = CliRunner().invoke(cli, [*d_small, "--json"])
    assert [run["arm"] for run in json.loads(shown.stdout)["runs"]] == ["resident"]
    words = ["--total-gib", "0.18", "--expert-plan", "cache", "--json"]
    shown = CliRunner().invoke(cli, [*d_small, *words])
    (run,) = json.loads(shown.stdout)["runs"]
    assert run["arm"] == "experts" and run["engine"]["expert_misses"] > 0
    with pytest.raises(ConfigError, match="give expert_slots, expert_gib, hot_gib or total_gib"):
        check_arms(["experts"], Options.of())
    rounded = Options.of(expert_slots=2, expert_cold_dtype="fp8")
    with pytest.raises(ConfigError, match="rounds the only copy of the experts"):
        check_arms(["resident", "experts"], rounded)
    check_arms(["resident"], rounded)
    on_disk = Options.of(expert_slots=2, expert_host_gib=1.0)
    with pytest.raises(ConfigError, match=r"expert_host_gib is 1\.0, which leaves experts on disk"):
        check_arms(["resident", "experts"], on_disk)


def test_prefetch_and_rounding_of_experts_are_reported(d_small: list[str]) -> None:
    words = ["--expert-slots", "32", "--expert-plan", "cache", "--verify"]
    shown = CliRunner().invoke(cli, [*d_small, *words, "--expert-prefetch", "8"])
    assert "experts differs in 0 of 4 answers" in shown.stdout
    [row] = [line for line in shown.stdout.splitlines() if "copied ahead" in line]
    predicted, right, copied = (int(cell.replace(",", "")) for cell in row.split()[-5::2])
    assert predicted >= right > 0 and predicted >= copied > 0
    shown = CliRunner().invoke(cli, [*d_small, *words, "--expert-cold-dtype", "int4", "--json"])
    (run,) = json.loads(shown.stdout)["runs"]
    assert run["arm"] == "experts"
    assert 0.05 < run["engine"]["expert_rounding_error"] < 0.15


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["cache", "auto", "stream"])
def test_on_a_gpu_experts_move_to_the_host_and_back_between_arms(
    plan: str, d_small: list[str]
) -> None:
    words = [*d_small, "--device", "cuda", "--dtype", "bfloat16", "--eager", "--repeats", "2"]
    words += ["--arms", "resident,experts", "--max-num-batched-tokens", "512"]
    words += ["--expert-slots", "32", "--expert-plan", plan, "--router-skew", "0.45", "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    for run in json.loads(done.stdout)["runs"]:
        assert run["output_tokens"] == 4 * 6
        is_buffered = run["arm"] == "experts"
        assert (run["engine"]["expert_bytes"] > 0) == is_buffered
        assert (run["sizes"]["experts_host_bytes"] > 0) == is_buffered
        if plan == "cache" and is_buffered:
            assert 0 < run["engine"]["expert_hit_rate"] < 1


def test_a_prediction_covers_skewed_routing(d_small: list[str]) -> None:
    words = [*d_small, "--expert-slots", "16", "--hardware", "h200", "--json"]
    words += ["--max-s", "0.01", "--router-skew"]  # predictions need no run to its end

    def decode_s(skew: str) -> list[float]:
        shown = CliRunner().invoke(cli, [*words, skew])
        return [run["prediction"]["decode_s"] for run in json.loads(shown.stdout)["runs"]]

    # Fewer experts are read, and fewer come from the host, where tokens share them.
    even, uneven = decode_s("0"), decode_s("1.5")
    assert all(one > other > 0 for one, other in zip(even, uneven, strict=True))
