"""What the config alone tells: refusals without weights, and multimodal models as text models."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
import transformers
from tiny_models import make_config, make_model
from tiny_tokenizer import make_tokenizer

from hotset.engine.load import load_engine
from hotset.errors import ConfigError, ModelError
from hotset.executor.probe import inspect_model
from hotset.linear.reads import is_read
from hotset.model import checkpoint
from hotset.model.architecture import find_architecture
from hotset.model.dummy import load_dummy
from hotset.model.loader import load_model
from hotset.options import Options
from hotset.text.prompt import PromptEncoder

REFUSED = {
    "mamba2": "layers of type linear_attention",
    "llama4_text": "layers of type chunked_attention",
    "bart": "is an encoder-decoder",
    "t5": "is an encoder-decoder",
    "whisper": "is an encoder-decoder",
    "bert": "is not causal",
    "bloom": "takes no position_ids",
    "pi0": "does not answer one token after another",
    "blip": "it needs pixel_values",
    "mllama": "layers",
}


def write_config(folder: Path, model_type: str, **changes: Any) -> Path:
    config = transformers.CONFIG_MAPPING[model_type]()
    config.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_config_without_weights_tells_why_its_model_is_refused(
    model_type: str, tmp_path: Path
) -> None:
    folder = write_config(tmp_path, model_type)
    with pytest.raises(ModelError, match=REFUSED[model_type]) as caught:
        load_model(str(folder), device="cpu", dtype="auto")
    assert "\n" not in str(caught.value)


def test_a_config_of_a_model_that_runs_is_refused_for_its_missing_weights(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama", hidden_size=64, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_model(str(folder), device="cpu", dtype="auto")


@pytest.mark.parametrize("model_type", ["qwen3_vl", "mistral3", "gemma3"])
def test_a_multimodal_model_is_loaded_without_what_only_images_go_through(
    model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_families.tiny_model(model_type)
    model.save_pretrained(tmp_path / model_type)
    capfd.readouterr()

    loaded = load_model(str(tmp_path / model_type), device="cpu", dtype="float32")
    inspect_model(copy.deepcopy(loaded.model))

    assert capfd.readouterr() == ("", "")

    text = {n: p for n, p in model.named_parameters() if "vis" not in n and "projector" not in n}
    assert dict(loaded.model.named_parameters()).keys() == text.keys()
    tokens = torch.tensor([[5, 9, 17, 33]])
    torch.testing.assert_close(loaded.model(tokens).logits, model(tokens).logits)
    [note] = loaded.notes
    assert "images" in note and "not loaded: model.vis" in note
    assert type(loaded.model).__name__ == type(model).__name__


def test_a_dtype_that_only_the_text_part_names_is_that_of_the_weights(tmp_path: Path) -> None:
    config = tiny_families.tiny_config("qwen3_vl").to_dict()  # published ones have it there
    config.pop("dtype", None)
    config["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert checkpoint.read_architecture(tmp_path).dtype is torch.bfloat16


def test_a_missing_text_weight_of_a_multimodal_model_is_refused(tmp_path: Path) -> None:
    model = tiny_families.tiny_model("qwen3_vl")
    del model.model.language_model.layers[0].self_attn.q_norm.weight
    model.save_pretrained(tmp_path / "cut")
    with pytest.raises(ModelError, match="missing keys"):
        load_model(str(tmp_path / "cut"), device="cpu", dtype="float32")


def test_random_weights_of_a_multimodal_model_are_its_text_part(tmp_path: Path) -> None:
    config = tiny_families.tiny_config("qwen3_vl")
    config.save_pretrained(tmp_path / "shape")
    loaded = load_dummy(str(tmp_path / "shape"), device="cpu", dtype="float32")
    assert loaded.model.model.visual is None
    assert loaded.notes


def test_layers_that_a_model_reads_are_known_from_its_config() -> None:
    config = tiny_families.tiny_config("hunyuan_v1_moe")
    found = find_architecture(config, "hunyuan", {})
    assert any(path.endswith(".wg") for path in found.read_layers)
    with torch.device("meta"):
        made = found.make(torch.float32)
    assert all(is_read(made.get_submodule(path)) for path in found.read_layers)


def test_a_processors_template_is_the_chat_template(tmp_path: Path) -> None:
    tiny_families.tiny_model("mistral3").save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))

    encoder = PromptEncoder(load_model(str(tmp_path), device="cpu", dtype="float32"))

    ids = encoder.encode_chat([{"role": "user", "content": "The cat"}])
    assert encoder.decode(ids) == "The cat"
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match=r"chat_template\.json is not JSON"):
        load_model(str(tmp_path), device="cpu", dtype="float32")


def test_kimi_k2_is_run_as_deepseek_v3_where_its_config_is_one(tmp_path: Path) -> None:
    model = make_model("deepseek_v3")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text()) | {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "seq_aux": True,
        "aux_loss_alpha": 0.001,
    }
    file.write_text(json.dumps(stored))

    loaded = load_model(str(tmp_path), device="cpu", dtype="float32")

    tokens = torch.tensor([[5, 9, 17, 33]])
    torch.testing.assert_close(loaded.model(tokens).logits, model(tokens).logits)
    dummy = load_dummy(str(tmp_path), device="cpu", dtype="float32")
    assert type(dummy.model) is type(model)
    for change in ({"scoring_func": "softmax"}, {"use_latent_moe": True}):
        file.write_text(json.dumps(stored | change))
        with pytest.raises(ModelError, match=rf"kimi_k2.*{next(iter(change))}"):
            load_model(str(tmp_path), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"expert_slots": 4}, "expert_slots is 4, but Llama.* has no experts"),
        ("llama", {"hot_gib": 1, "expected_users": 2}, "expected_users is 2, but Llama.* has no"),
        ("qwen3_moe", {"expert_slots": 400}, "expert_slots is 400, but a layer has 8"),
        ("qwen3_moe", {"expert_gib": 1e-6}, "expert_gib 1e-06 holds too little"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_its_weights_are_read(
    family: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_config(family).save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(ConfigError, match=reason):
        load_engine(Options.of(model=str(tmp_path), device="cpu", **options))


def test_a_model_whose_answers_nobody_could_read_is_refused_before_its_weights(
    tmp_path: Path,
) -> None:
    folder = write_config(tmp_path, "llama", hidden_size=64, num_hidden_layers=2)
    with pytest.raises(ModelError, match="has no tokenizer files"):
        load_engine(Options.of(model=str(folder), device="cpu"))
