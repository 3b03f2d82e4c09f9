"""The device and the dtypes that a model gets, from the words of options."""

import torch

from hotset.cgroups import available_host_bytes
from hotset.errors import ConfigError, ModelError
from hotset.linear.fp8 import FP8
from hotset.parallel.group import current


def resolve_device(device: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device this machine has: this rank's."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu or cuda") from None
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; expected auto, cpu or cuda")
    if target.type == "cuda" and current().size > 1:
        return current().device
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but torch finds no NVIDIA GPU here; use cpu")
        count = torch.cuda.device_count()
        if (target.index or 0) >= count:
            raise ConfigError(f"device is {device!r} but this machine has {count} GPUs")
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """The torch dtype asked for; None is the checkpoint's own."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    names = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "fp8": torch.bfloat16,  # of what is not a weight of a linear layer
    }
    if dtype not in names:
        raise ConfigError(f"dtype is {dtype!r}; expected auto, {', '.join(names)}")
    if dtype == "fp8":
        _require_fp8("dtype is fp8", device)
    return names[dtype]


def resolve_kv_dtype(
    kv_dtype: str, device: torch.device, option: str = "kv_dtype"
) -> torch.dtype | None:
    """What keys and values, or the index keys of `option`, are stored in; None: the model's dtype.

    Raises:
        ConfigError: the GPU has no such numbers.
    """
    if kv_dtype == "auto":
        return None
    _require_fp8(f"{option} is fp8", device)
    return FP8


def check_rounded_inputs(device: torch.device, dtype: str) -> None:
    """Refuse to round what weights are multiplied with where no kernel does.

    Raises:
        ConfigError: says where.
    """
    problem = None
    if device.type != "cuda":
        problem = f"device is {device.type}, which multiplies with 16 bits or more"
    elif current().size > 1:
        problem = "each of several GPUs has a part of every weight"
    elif dtype in ("fp8", "float32"):
        problem = f"dtype is {dtype}, which does not keep a checkpoint's weights"
    if problem is not None:
        raise ConfigError(f"activations is 8, but {problem}; leave activations out")
    _require_fp8("activations is 8", device)


def _require_fp8(asked: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"{asked}, which {torch.cuda.get_device_name(device)} does not compute with; "
            "expected a GPU of compute capability 8.9 (Ada, Hopper) or more: leave it out"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device: on the CPU, what this process may still take."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return available_host_bytes()


def check_room(num_bytes: int, device: torch.device, model: str, dtype: torch.dtype) -> None:
    """Refuse weights that are larger than the memory that is free on a device.

    Raises:
        ModelError: they are.
    """
    if num_bytes > (free := free_bytes(device)):
        raise ModelError(
            f"the weights of {model} in {str(dtype).removeprefix('torch.')} take "
            f"{num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free on {device}; take a "
            "smaller model or a narrower dtype, or give this process more memory"
        )
