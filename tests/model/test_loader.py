import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer
from transformers import MambaConfig

from hotset.checkpoint import fingerprint
from hotset.errors import ConfigError, ModelError
from hotset.model.loader import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete checkpoint of a tiny llama."""
    return save_tiny(tmp_path / "tiny-llama")


def save_tiny(path: Path) -> Path:
    make_model("llama", vocab_size=512).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def load_error(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(name), device="cpu", dtype="auto")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_loads_with_its_weights_tokenizer_and_ends(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="auto")

    expected = make_model("llama", vocab_size=512).state_dict()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.name == "tiny-llama"
    assert loaded.max_model_len == 512
    assert loaded.eos_token_ids == (2,)
    assert loaded.require_tokenizer().decode(loaded.tokenizer.encode("The cat")) == "The cat"


@pytest.mark.parametrize("family", ["gpt_oss", "gemma3_text"])
def test_architectures_without_sdpa_or_with_mixed_layers_load(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path / family)

    loaded = load_model(str(tmp_path / family), device="cpu", dtype="float32")

    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)


def test_the_dtype_asked_for_is_the_dtype_of_every_weight(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="bfloat16")

    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_every_end_of_generation_config_and_tokenizer_counts(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))

    assert set(load_model(str(folder), device="cpu", dtype="auto").eos_token_ids) == {2, 7, 9}


def test_a_folder_without_tokenizer_loads_and_says_so_when_text_is_needed(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()

    loaded = load_model(str(folder), device="cpu", dtype="auto")

    assert loaded.tokenizer is None
    with pytest.raises(ModelError, match=r"no tokenizer files.*token ids only"):
        loaded.require_tokenizer()


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(folder), device="cpu", dtype="auto")

    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_follows_content_and_not_names_or_times(
    folder: Path, tmp_path: Path
) -> None:
    before = fingerprint.fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(copy / "model.safetensors", (1, 1))
    assert fingerprint.fingerprint(copy) == before

    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    changed_weight = fingerprint.fingerprint(copy)
    assert changed_weight != before

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fingerprint.fingerprint(copy) not in (before, changed_weight)


def test_the_fingerprint_follows_the_way_of_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint.fingerprint(folder)
    monkeypatch.setattr(fingerprint, "READING", b"another")

    assert fingerprint.fingerprint(folder) != before


def test_the_sampled_fingerprint_sees_a_changed_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "FULL_HASH_BYTES", 0)
    before = fingerprint.fingerprint(folder)

    make_model("llama", seed=1, vocab_size=512).save_pretrained(folder)

    assert fingerprint.fingerprint(folder) != before


def test_shards_load_and_a_missing_one_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    make_model("llama", vocab_size=512).save_pretrained(folder, max_shard_size="200KB")
    assert load_model(str(folder), device="cpu", dtype="auto").max_model_len == 512

    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in load_error(folder)


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in load_error(folder)
    (folder / "weights.gguf").touch()
    assert "give that file" in load_error(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "it has pytorch_model.bin" in load_error(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": "llama9"}', "'llama9' model, which transformers .* does not know"),
        ('{"model_type": "vit"}', "'vit' model, which transformers .* cannot run"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "c.C"}}', "Python code of its own"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot use .*config.json"),
    ],
)
def test_a_bad_config_is_refused_with_its_reason(folder: Path, text: str, expected: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=expected):
        load_model(str(folder), device="cpu", dtype="auto")
    assert "\n" not in load_error(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot load the weights" in load_error(folder)
    weights.write_bytes(b"\xff" * 100)
    assert "cannot load the weights" in load_error(folder)
    weights.write_bytes(b"")
    assert "cannot load the weights" in load_error(folder)


def test_weights_that_lack_a_tensor_or_have_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "missing keys" in load_error(folder)

    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    load_error(folder)


def test_a_damaged_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert "cannot load the tokenizer" in load_error(folder)


def test_a_path_that_is_not_there_names_one_that_is_like_it(folder: Path) -> None:
    assert f"did you mean {folder}?" in load_error(folder.parent / "tiny-lama")
    assert "there is no folder" in load_error(folder / "no" / "such" / "model")
    assert "no such file" in load_error("model.gguf")


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a model" in load_error(tmp_path / "notes.txt")
    (tmp_path / "a.gguf").write_text("hello")
    assert "does not start with 'GGUF'" in load_error(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 7))
    assert "cannot load the weights" in load_error(tmp_path / "b.gguf")


def test_devices_and_dtypes_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        load_model(str(folder), device="abacus", dtype="auto")
    with pytest.raises(ConfigError, match="expected auto, float32"):
        load_model(str(folder), device="cpu", dtype="float8")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no NVIDIA GPU"):
            load_model(str(folder), device="cuda", dtype="auto")


class _Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs; `tests/NAME` is the folder NAME of `root`."""

    root: Path

    def do_GET(self) -> None:
        sha = "a" * 40
        route = self.path.split("?")[0]
        is_api, _, path = route.partition("/tests/")
        name, _, rest = path.partition("/")
        folder = self.root / name
        file = folder / rest.rsplit("/", 1)[-1]
        if name == "gated":
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif not name or not folder.is_dir():
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif is_api and rest.startswith("tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                for f in folder.iterdir()
            ]
            self._answer(200, json.dumps(entries).encode())
        elif is_api:
            info = {"id": f"tests/{name}", "sha": sha, "siblings": []}
            self._answer(200, json.dumps(info).encode())
        elif file.is_file():
            self._answer(200, file.read_bytes(), {"ETag": f'"{file.name}"', "X-Repo-Commit": sha})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a process whose hub is a local server.

    It has a model, one whose config is refused, and an adapter.
    """
    root = tmp_path_factory.mktemp("hub") / "tests"
    save_tiny(root / "tiny")
    shutil.copytree(root / "tiny", root / "refused")
    MambaConfig(num_hidden_layers=2).save_pretrained(root / "refused")
    shutil.copytree(root / "tiny", root / "adapter")
    (root / "adapter/config.json").unlink()
    (root / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "tests/base"}')
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Hub", (_Hub,), {"root": root}), bind_and_activate=True
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(root.with_name("cache")),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()
    thread.join()


LOAD_EACH = """
import sys
from hotset.errors import ModelError
from hotset.model.loader import load_model
for name in sys.argv[1:]:
    try:
        loaded = load_model(name, device="cpu", dtype="auto")
        print("loaded", loaded.name, loaded.max_model_len, loaded.tokenizer is not None)
    except ModelError as error:
        print("refused", error)
"""


def load_each(
    environment: dict[str, str], *names: str, cwd: Path | None = None
) -> tuple[list[str], list[str]]:
    """The lines that a process prints that loads each of `names`, to stdout and to stderr."""
    run = subprocess.run(
        [sys.executable, "-c", LOAD_EACH, *names],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
    )
    return run.stdout.splitlines(), run.stderr.splitlines()


@pytest.fixture(scope="module")
def loaded_of_hub(
    hub_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], list[str]]:
    """The line of each name that one process loads, and what it says to stderr."""
    names = ["tests/tiny", "tests/gated", "tests/missing", "tiny-lama", "a b", "tests/refused"]
    names.append("tests/adapter")
    cwd = tmp_path_factory.mktemp("folders")
    (cwd / "tiny-llama").mkdir()
    lines, messages = load_each(hub_environment, *names, cwd=cwd)
    return dict(zip(names, lines, strict=True)), messages


def test_hub_models_download_and_each_way_to_fail_is_one_line(
    hub_environment: dict[str, str], loaded_of_hub: tuple[dict[str, str], list[str]]
) -> None:
    line_of, messages = loaded_of_hub
    assert line_of["tests/tiny"] == "loaded tests/tiny 512 True"
    assert line_of["tests/gated"].startswith("refused model tests/gated is gated: accept its terms")
    assert line_of["tests/missing"].startswith("refused model 'tests/missing' is neither")
    assert "did you mean tiny-llama?" in line_of["tiny-lama"]
    assert "cannot be a hub id" in line_of["a b"]
    assert [m for m in messages if not m.startswith("hotset: downloading tests/tiny")] == []

    offline = {**hub_environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    lines, messages = load_each(offline, "tests/tiny", "tests/other")
    assert lines[0] == "loaded tests/tiny 512 True"  # from the cache
    assert "the hub cannot be reached" in lines[1]
    assert messages == []


def test_a_hub_model_that_its_config_refuses_is_not_downloaded(
    hub_environment: dict[str, str], loaded_of_hub: tuple[dict[str, str], list[str]]
) -> None:
    line = loaded_of_hub[0]["tests/refused"]
    assert line.startswith("refused MambaForCausalLM has layers of type linear_attention")
    cache = Path(hub_environment["HF_HOME"]) / "hub/models--tests--refused"
    names = {path.name for path in cache.rglob("*")}
    assert "config.json" in names
    assert not any(name.endswith(".safetensors") for name in names)


def test_an_adapter_on_the_hub_is_named_as_one(
    loaded_of_hub: tuple[dict[str, str], list[str]],
) -> None:
    line = loaded_of_hub[0]["tests/adapter"]
    assert "tests/adapter has no config.json: it is a LoRA adapter of tests/base" in line


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(
        p.nbytes for p in load_model(str(folder), device="cpu", dtype="auto").model.parameters()
    )
    monkeypatch.setattr("hotset.model.devices.available_host_bytes", lambda: weights - 1)
    (folder / "model.safetensors").write_bytes(b"not looked at")
    with pytest.raises(ModelError, match=r"in float32 take 0\.00 GB and 0\.00 GB are free on cpu"):
        load_model(str(folder), device="cpu", dtype="float32")
    monkeypatch.setattr("hotset.model.devices.available_host_bytes", lambda: weights)
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), device="cpu", dtype="float32")


def test_weights_that_are_dequantised_have_to_fit_as_what_they_become(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    fields = {**config, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr("hotset.model.devices.available_host_bytes", lambda: 1000)
    with pytest.raises(ModelError, match=r"in float32 take 0\.00 GB and 0\.00 GB are free on cpu"):
        load_model(str(folder), device="cpu", dtype="float32")
