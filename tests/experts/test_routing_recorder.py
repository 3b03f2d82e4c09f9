"""What is recorded is where tokens really went, and recording changes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from engines import make_engine, run
from tiny_models import make_model

from hotset.cli.bench import command
from hotset.errors import ConfigError
from hotset.experts.gating import use_dynamic_gating
from hotset.experts.recorder import LayerCounts, RoutingRecorder, write_routing

PROMPTS = [[5, 9, 11, 40, 3], [7, 8, 30]]


def test_each_step_counts_top_k_experts_of_each_token_in_each_layer(tmp_path: Path) -> None:
    engine = make_engine("qwen3_moe")
    plain = run(engine, PROMPTS, max_tokens=6)
    recorder = RoutingRecorder(engine.executor.runner._model)
    engine.record_routing(recorder)
    try:
        assert run(engine, [[*p] for p in PROMPTS], max_tokens=6) == plain
    finally:
        engine.record_routing(None)
        engine.close()
    history = recorder.history()
    tokens = np.array(recorder.step_tokens)
    assert history.shape == (len(tokens), 3, 8)
    np.testing.assert_array_equal(history.sum(2), np.repeat(3 * tokens[:, None], 3, axis=1))
    assert tokens.sum() >= 5  # each prompt's last token and each token but the last, at least
    for name in ("routing.npz", "routing.json"):
        assert write_routing(tmp_path / name, recorder, {"model": "m"}) == len(tokens)
    with np.load(tmp_path / "routing.npz", allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["history"], history)
        both = ((history[:, 1, 2] > 0) & (history[:, 1, 5] > 0)).sum()
        assert stored["co_activation"][1, 2, 5] == both
    assert json.loads((tmp_path / "routing.json").read_text())["history"] == history.tolist()


def test_counts_are_those_of_the_routers() -> None:
    model = make_model("qwen3_moe")
    use_dynamic_gating(model)
    recorder = RoutingRecorder(model)
    chosen: list[torch.Tensor] = []
    for layer in recorder._layers:
        layer.module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].clone()))
    recorder.begin_step(7)
    with torch.inference_mode():
        model(torch.arange(7).unsqueeze(0))
    [step] = recorder.history()
    for counted, ids in zip(step, chosen, strict=True):
        np.testing.assert_array_equal(counted, torch.bincount(ids.reshape(-1), minlength=8))
    recorder.detach()
    assert recorder._layers[0].counts is None


def test_padding_and_experts_of_other_ranks_do_not_count_in_one_graph_for_all_steps() -> None:
    counts = LayerCounts(torch.zeros(5, dtype=torch.int64), torch.tensor(2))
    ids = torch.tensor([[0, 3], [0, 4], [1, 2]])  # expert 4 is another rank's; the last is padding
    graph = torch.compile(counts.add, backend="aot_eager", fullgraph=True)
    graph(ids)
    assert counts.counts[:4].tolist() == [2, 0, 0, 1]
    counts.num_tokens.fill_(3)
    graph(ids)
    assert counts.counts[:4].tolist() == [4, 1, 1, 2]


def test_a_model_without_experts_and_an_empty_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experts"):
        RoutingRecorder(make_model("llama"))
    model = make_model("qwen3_moe")
    use_dynamic_gating(model)
    with pytest.raises(ConfigError, match="no step"):
        write_routing(tmp_path / "x.npz", RoutingRecorder(model), {})


def test_bench_records_the_routing_of_its_work(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "routing.npz"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(make_model("qwen3_moe").config.to_dict()))
    words = ["unshared", "--model", str(folder), "--dummy-weights", "--users", "2", "--turns", "1"]
    words += ["--first-tokens", "8", "--output-tokens", "4", "--arms", "hot", "--hot-gib", "0.01"]
    words += ["--max-model-len", "64", "--device", "cpu", "--record-routing", str(out)]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with np.load(out, allow_pickle=False) as stored:
        # The last token of an answer is chosen and not computed.
        assert stored["step_tokens"].sum() == 2 * (8 + 4 - 1)
        assert stored["history"].sum() == 2 * 11 * 3 * 3
        assert json.loads(str(stored["about"]))["top_k"] == 3
    words[-1] = str(tmp_path / "routing.txt")
    refused = CliRunner().invoke(command, words)
    assert isinstance(refused.exception, ConfigError)
    assert ".npz or .json" in str(refused.exception)
