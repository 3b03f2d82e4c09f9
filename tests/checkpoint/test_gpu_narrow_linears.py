"""Linear layers that stay in few bits on an NVIDIA GPU: run with `pytest -m gpu`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run
from test_fp8_blocks import save_in_blocks
from test_int_groups import FORMS, save
from tiny_models import make_model
from tiny_tokenizer import make_tokenizer

from hotset.engine.load import load_engine
from hotset.linear import quant_linear
from hotset.linear.eight_bit import reference_product
from hotset.linear.quant_linear import (
    QuantLinear,
    check,
    key_of,
    quant_matrix,
    quant_product,
    random_payload,
)
from hotset.model.loader import load_model
from hotset.model.narrow_linears import narrow_bytes
from hotset.options import Options
from hotset.weight_format import (
    AWQ_128,
    FP8_BLOCK,
    FP8_ROW,
    INT4_128,
    MXFP4,
    NF4,
    NVFP4,
    WeightFormat,
)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
ALL = [
    FP8_ROW,
    FP8_BLOCK,
    INT4_128,
    AWQ_128,
    MXFP4,
    NVFP4,
    NF4,
    WeightFormat("int8", "float32", 1, None),
    WeightFormat("int4", "float16", 1, 32, has_zeros=True),
    replace(FP8_ROW, input_bits=8),
    replace(FP8_BLOCK, input_bits=8),
]
PROMPTS = [list(range(3, 3 + n)) for n in (5, 40, 90)]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.mark.parametrize("form", ALL, ids=lambda form: f"{form.name} {form.scale}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_pass_their_trial(form: WeightFormat, dtype: torch.dtype) -> None:
    assert check(form, dtype, torch.device("cuda")) is None


@pytest.mark.parametrize("form", ALL, ids=lambda form: f"{form.name} {form.scale}")
@pytest.mark.parametrize("num_rows", [1, 64, 65, 512])
@torch.inference_mode()
def test_products_of_large_layers_are_those_of_the_widened_weight(
    form: WeightFormat, num_rows: int
) -> None:
    matrix = quant_matrix(form, (6144, 4096))
    payload = random_payload(matrix, torch.Generator().manual_seed(0)).cuda()
    x = torch.randn(num_rows, 4096, device="cuda").bfloat16()
    check(form, torch.bfloat16, x.device)  # tries PyTorch's product of inputs in 8 bits
    expected = reference_product(x, payload, matrix)
    found = quant_product(x, payload, key_of(matrix)).float()
    assert (found - expected).norm() < 5e-3 * expected.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = quant_product(x, payload, key_of(matrix))
    graph.replay()
    assert torch.equal(recorded.float(), found)


@pytest.mark.parametrize("form", ALL[-2:], ids=lambda form: form.name)
def test_pytorch_multiplies_many_rows_of_8_bits_on_hopper(form: WeightFormat) -> None:
    assert check(form, torch.bfloat16, torch.device("cuda")) is None
    if torch.cuda.get_device_capability() == (9, 0):
        assert form in quant_linear._scaled


def write(form: str, folder: Path) -> None:
    model = make_model("llama", **SIZES)
    if form == "blocks":
        save_in_blocks(model, folder)
    else:
        make, config = next(each for each in FORMS if each[0].__name__ == form)
        save(model, folder, make, config)


@pytest.mark.parametrize(
    "form", ["awq", "packed", "float_rows", "float_whole", "int_rows", "nvfp4_packed", "blocks"]
)
def test_a_model_in_few_bits_answers_as_the_widened_one(form: str, tmp_path: Path) -> None:
    write(form, tmp_path)
    wide = load_model(str(tmp_path), device="cpu", dtype="bfloat16").model.to("cuda")
    loaded = load_model(str(tmp_path), device="cuda", dtype="bfloat16")
    narrow = loaded.model
    assert any(isinstance(module, QuantLinear) for module in narrow.modules())
    assert (
        0
        < narrow_bytes(narrow)
        < 0.75
        * sum(
            2 * layer.weight.numel()
            for name, layer in wide.named_modules()
            if name.endswith("proj")
        )
    )
    assert any("linear layers are kept as" in note for note in loaded.notes)
    ids = torch.arange(3, 90, device="cuda").unsqueeze(0)
    with torch.inference_mode():
        for tokens in (ids, ids[:, :7]):
            one, two = narrow(tokens, use_cache=False).logits, wide(tokens, use_cache=False).logits
            # Those of the wide one are rounded, where scales are of rows or of the whole weight.
            assert (one - two).float().norm() < 5e-2 * two.float().norm()


@pytest.mark.parametrize("form", ["awq", "blocks"])
def test_recorded_steps_answer_as_launched_ones(form: str, tmp_path: Path) -> None:
    write(form, tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    def answers(**changes: Any) -> list[list[int]]:
        options = Options.of(
            model=str(tmp_path), device="cuda", dtype="bfloat16", hot_gib=0.1, max_num_seqs=4,
            **changes,
        )  # fmt: skip
        engine, loaded = load_engine(options)
        try:
            assert narrow_bytes(loaded.model) > 0
            return run(engine, PROMPTS)
        finally:
            engine.close()

    assert answers() == answers(eager=True)


@pytest.mark.parametrize("form", ["float_rows", "blocks"])
def test_a_model_with_inputs_in_8_bits_answers_the_same_in_any_batch(
    form: str, tmp_path: Path
) -> None:
    write(form, tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    options = Options.of(model=str(tmp_path), device="cuda", dtype="bfloat16", activations="8",
                         hot_gib=0.05, max_model_len=128)  # fmt: skip
    engine, loaded = load_engine(options)
    try:
        assert "inputs in 8 bits" in str(loaded.notes)
        assert loaded.fingerprint != load_model(
            str(tmp_path), device="cuda", dtype="bfloat16"
        ).fingerprint  # fmt: skip
        assert run(engine, PROMPTS) == run(engine, PROMPTS)
    finally:
        engine.close()
