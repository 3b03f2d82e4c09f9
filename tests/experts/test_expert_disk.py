"""Experts on disk: the answers of resident ones, within the memory given, and errors for faults."""

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import give_slots, make_slots, reference, run
from expert_layers import (
    KINDS,
    NUM_EXPERTS,
    buffered,
    computed,
    group,
    make_layers,
    packed,
)
from test_expert_buffer import PROMPTS
from test_experts import MOE_FAMILIES
from tiny_models import make_config, make_model
from tiny_tokenizer import make_backend
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hotset.engine.build import build_engine
from hotset.engine.engine import Engine
from hotset.engine.load import load_engine
from hotset.errors import ConfigError, HotsetError
from hotset.expert_options import AllResident
from hotset.experts.buffer import ExpertBuffer
from hotset.experts.disk import DiskExperts, ExpertSink
from hotset.experts.gating import use_dynamic_gating
from hotset.experts.store import FILE, ExpertStore
from hotset.experts.weights import experts_layers, experts_of
from hotset.model.dummy import load_dummy
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.request import FinishReason, SamplingParams
from hotset.units import GIB

MakeEngine = Callable[..., Engine]
PAYLOAD = 24 * 1024  # an expert of the tiny qwen3_moe


def on_disk(
    layers: list[Any], folder: Path, *, host_slots: int, **options: Any
) -> tuple[list[Any], ExpertBuffer]:
    """A copy of the layers, their experts on disk."""
    layers = copy.deepcopy(layers)
    experts = [experts_of(layer) for layer in layers]
    store = ExpertStore(
        folder,
        experts[0].layout,
        num_layers=len(layers),
        num_experts=NUM_EXPERTS,
        num_slots=host_slots,
        read_deadline_s=60.0,
    )
    sink = ExpertSink(AllResident(), read_deadline_s=60.0)
    sink.store = store
    for each in experts:
        sink.take(each)
    return layers, make_slots(experts, Options.of(**options), torch.device("cpu"))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("host_slots", [2, 7, 14])
@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_experts_on_disk_compute_exactly_what_resident_ones_do(
    kind: dict[str, bool],
    num_slots: int,
    host_slots: int,
    grouped: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = make_layers(3, **kind)
    if grouped:
        group(monkeypatch)
        resident, _ = buffered(layers, expert_slots=num_slots, expert_plan="cache")
    else:
        resident = packed(layers)
    others, buffer = on_disk(
        layers, tmp_path, host_slots=host_slots, expert_slots=num_slots, expert_plan="auto"
    )
    assert buffer.store is not None
    for num_tokens in (1, 9, 2, 1, 3, 33, 1):
        for got, expected in computed(others, resident, num_tokens):
            assert torch.equal(got, expected)
            buffer.store.check()
    counts = buffer.counts()
    assert counts.expert_disk_reads > 0
    buffer.close(with_disk=True)


def disk_options(num_payloads: float, folder: Path, payload: int = PAYLOAD) -> dict[str, Any]:
    return {"expert_host_gib": num_payloads * payload / GIB, "expert_disk_path": folder}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_an_engine_answers_the_same_with_experts_on_disk(
    family: str, make_engine: MakeEngine, tmp_path: Path
) -> None:
    model = make_model(family)
    payload = max(each.layout.payload_bytes for each in experts_layers(model))
    options = disk_options(4.5, tmp_path, payload)
    engine = make_engine(family, max_num_batched_tokens=16, expert_slots=2, **options)
    assert run(engine, PROMPTS) == reference(family, PROMPTS)
    assert engine.metrics.expert_disk_reads > 0
    assert engine.metrics.expert_disk_bytes == engine.metrics.expert_disk_reads * payload
    assert engine.metrics.expert_disk_wait_s > 0
    assert "on disk" in engine.report and str(tmp_path) in engine.report
    assert "plan cache" in engine.report
    assert not engine.metrics.faults


def test_a_prompt_reads_the_next_layer_ahead(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine("qwen3_moe", expert_slots=2, **disk_options(12, tmp_path))
    seen: list[tuple[int, list[Any]]] = []
    assert engine.experts is not None and engine.experts.store is not None
    store = engine.experts.store
    expect = store.expect

    def watched(layer: int, experts: Any, ahead: Any) -> None:
        seen.append((layer, list(ahead)))
        expect(layer, experts, ahead)

    store.expect = watched  # type: ignore[method-assign]
    run(engine, [list(range(40))], max_tokens=2)
    assert [layer for layer, _ in seen] == [0, 1, 2, 0, 1, 2]
    for number, (layer, ahead) in enumerate(seen):
        if number < 2:
            assert len(ahead) == 6 and {key[0] for key in ahead} == {layer + 1}
        else:  # the last layer, and a decode
            assert not ahead


@pytest.mark.parametrize("fault", ["flip", "truncate"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_damaged_expert_ends_the_requests_of_the_step_and_no_others(
    fault: str, overlap: bool, make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine("qwen3_moe", expert_slots=1, overlap=overlap, **disk_options(2, tmp_path))
    path = tmp_path / FILE
    content = path.read_bytes()
    if fault == "truncate":
        os.truncate(path, 17 * PAYLOAD)
    else:
        path.write_bytes(bytes(byte ^ (i % PAYLOAD == 5) for i, byte in enumerate(content)))
    for prompt in PROMPTS:
        engine.add_request(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    ended = [output for output in outputs if output.finish_reason is not None]
    assert [output.finish_reason for output in ended] == [FinishReason.ERROR] * len(PROMPTS)
    for output in ended:
        assert output.error is not None and "cannot be read" in output.error
        assert "\n" not in output.error and str(path) in output.error
    kind = "expert_disk_corrupt" if fault == "flip" else "expert_disk_truncated"
    assert engine.metrics.faults[kind] >= 1
    assert not any(output.token_ids for output in outputs)  # nothing was made of it
    engine.kv.check()
    path.write_bytes(content)  # the process lives, and serves what can be read
    assert run(engine, PROMPTS) == reference("qwen3_moe", PROMPTS)


def save(model: PreTrainedModel, folder: Path) -> None:
    """With a tokenizer, which ends no answer."""
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=make_backend()).save_pretrained(folder)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "granitemoe"])
def test_a_checkpoint_goes_to_disk_while_it_is_loaded(family: str, tmp_path: Path) -> None:
    save(make_model(family), tmp_path / "model")
    reference_model = make_model(family)
    layout = experts_layers(reference_model)[0].layout
    config = Options.of(
        model=str(tmp_path / "model"),
        device="cpu",
        hot_gib=0.001,
        max_model_len=64,
        expert_slots=1,
        **disk_options(3, tmp_path / "disk", layout.payload_bytes),
    )
    before = dict(os.environ)
    engine, loaded = load_engine(config)
    assert dict(os.environ) == before
    hosted = [experts.hosted for experts in experts_layers(loaded.model)]
    assert all(each is not None and isinstance(each.source, DiskExperts) for each in hosted)
    assert run(engine, PROMPTS) == reference(family, PROMPTS)
    assert (tmp_path / "disk" / FILE).exists()
    engine.close()
    assert not (tmp_path / "disk" / FILE).exists()
    with pytest.raises(ConfigError, match="load it again"):
        build_engine(config, loaded)


def test_random_weights_are_the_same_on_disk_and_go_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(make_config("qwen3_moe").to_dict()))
    options = {"device": "cpu", "dtype": "auto"}
    expected = load_dummy(str(tmp_path), **options).model
    config = Options.of(expert_slots=2, **disk_options(4, tmp_path / "disk"))
    sink = ExpertSink(config.experts, read_deadline_s=60.0)
    model = load_dummy(str(tmp_path), **options, experts_on_host=True, experts=sink).model
    use_dynamic_gating(model)
    buffer, _ = give_slots(model, config)
    tokens = torch.tensor([[5, 9, 13, 200]])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    assert buffer is not None
    buffer.close()
    # Another engine over the same model, with other slots.
    again, _ = give_slots(model, Options.of(expert_slots=5, **disk_options(4, tmp_path / "disk")))
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    for wrong in (Options.of(expert_slots=2), Options.of(expert_slots=2, expert_host_gib=1)):
        with pytest.raises(ConfigError, match="are on disk with"):
            give_slots(model, wrong)
    assert (tmp_path / "disk" / FILE).exists()
    del model, buffer, again, sink
    gc.collect()
    assert not (tmp_path / "disk" / FILE).exists()


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_file(tmp_path: Path) -> None:
    save(make_model("qwen3_moe"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2000])
    config = Options.of(
        model=str(tmp_path / "model"),
        device="cpu",
        expert_slots=1,
        **disk_options(3, tmp_path / "disk"),
    )
    with pytest.raises(HotsetError, match="cannot load the weights"):
        load_engine(config)
    assert not (tmp_path / "disk" / FILE).exists()


def test_an_engine_that_cannot_be_built_leaves_no_file(tmp_path: Path) -> None:
    save(make_model("qwen3_moe"), tmp_path / "model")
    config = Options.of(
        model=str(tmp_path / "model"),
        device="cpu",
        hot_gib=1e-6,  # not one block
        expert_slots=1,
        **disk_options(3, tmp_path / "disk"),
    )
    with pytest.raises(ConfigError, match="hot_gib"):
        load_engine(config)
    assert not (tmp_path / "disk" / FILE).exists()


def test_what_fits_in_host_memory_is_not_on_disk_and_the_report_says_so(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    save(make_model("qwen3_moe"), tmp_path / "model")
    options = disk_options(24, tmp_path / "disk")
    engine = make_engine("qwen3_moe", expert_slots=2, **options)
    assert "holds them all, none is on disk" in engine.report
    config = Options.of(
        model=str(tmp_path / "model"), device="cpu", hot_gib=0.001, expert_slots=2, **options
    )
    built, _ = load_engine(config)
    assert "holds them all, none is on disk" in built.report
    assert run(built, PROMPTS) == reference("qwen3_moe", PROMPTS)
    built.close()
    assert not (tmp_path / "disk").exists()


def test_flags_that_cannot_work_are_refused_in_one_line(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    for options in (
        {"expert_host_gib": 1.0},
        {"expert_host_gib": 0.0, "expert_slots": 1},
        {"expert_disk_path": tmp_path, "expert_slots": 1},
    ):
        with pytest.raises(ConfigError, match="expert_"):
            Options.of(**options)
    with pytest.raises(ConfigError, match=r"holds 1 experts .* give 4\.6e-05 or more"):
        make_engine("qwen3_moe", expert_slots=2, **disk_options(1.9, tmp_path))
    with pytest.raises(ConfigError, match="expert_plan is 'stream'"):
        make_engine("qwen3_moe", expert_slots=2, expert_plan="stream", **disk_options(5, tmp_path))
    with pytest.raises(ConfigError, match="does nothing while all experts are on the device"):
        make_engine("qwen3_moe", expert_slots=8, **disk_options(5, tmp_path))
    with pytest.raises(ConfigError, match="what is on disk is not rounded"):
        make_engine(
            "qwen3_moe", expert_slots=2, expert_cold_dtype="fp8", **disk_options(2, tmp_path)
        )
    with pytest.raises(ConfigError, match="expert_prefetch is 1, but expert_host_gib"):
        make_engine("qwen3_moe", expert_slots=2, expert_prefetch=1, **disk_options(5, tmp_path))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"):
        make_engine("llama", expert_slots=2, **disk_options(5, tmp_path))
    assert not (tmp_path / FILE).exists()


MEMORY_PROBE = """
import sys, threading, time
from pathlib import Path
from hotset.expert_options import AllResident
from hotset.options import Options
from hotset.engine.load import load_engine
from hotset.request import SamplingParams
import torch
torch.set_num_threads(1)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

peak, is_done = 0, False
def watch():
    global peak
    while not is_done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

small, large, folder, host_gib, expert_gib = sys.argv[1:]
def serve(model, **options):
    config = Options.of(model=model, device="cpu", hot_gib=0.001, max_model_len=64, **options)
    engine, loaded = load_engine(config)
    engine.add_request([5, 9, 13, 7] * 8, SamplingParams(max_tokens=8, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
    engine.close()
serve(small)  # what libraries take
before = anonymous()
thread = threading.Thread(target=watch, daemon=True)
thread.start()
serve(large, expert_host_gib=float(host_gib), expert_gib=float(expert_gib), expert_plan="cache",
      expert_disk_path=Path(folder))
is_done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_host_memory_stays_within_the_budget_while_loading_and_serving(tmp_path: Path) -> None:
    save(make_model("qwen3_moe"), tmp_path / "small")
    sizes = {"num_experts": 32, "moe_intermediate_size": 128, "hidden_size": 256}
    model = make_model("qwen3_moe", num_hidden_layers=16, **sizes)
    save(model, tmp_path / "large")
    expert_bytes = 3 * 128 * 256 * 4
    layer_bytes = 32 * expert_bytes
    others_bytes = sum(p.nbytes for p in model.parameters()) - 16 * layer_bytes
    host_bytes, device_bytes = 2 * layer_bytes, 16 * expert_bytes
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            MEMORY_PROBE,
            str(tmp_path / "small"),
            str(tmp_path / "large"),
            str(tmp_path / "disk"),
            str(host_bytes / GIB),
            str(device_bytes / GIB),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    taken_bytes = int(ran.stdout)
    # While a layer is loaded: its pieces, what they are joined to, and one that is complete. And
    # what the allocator and the engine keep.
    loading_bytes, slack_bytes = 3 * layer_bytes, 24 * 2**20
    bound = host_bytes + device_bytes + others_bytes + loading_bytes + slack_bytes
    assert bound < 0.7 * 16 * layer_bytes
    assert taken_bytes < bound, (taken_bytes, bound)


def test_a_gguf_or_plain_load_without_a_bound_is_as_before(tmp_path: Path) -> None:
    save(make_model("qwen3_moe"), tmp_path)
    sink = ExpertSink(Options.of(expert_slots=2).experts, read_deadline_s=60.0)
    loaded = load_model(
        str(tmp_path), device="cpu", dtype="auto", experts_on_host=True, experts=sink
    )
    assert sink.store is None
    assert all(each.weights is not None for each in experts_layers(loaded.model))
