"""The fleet secret: who has it may join, and nothing else of the fleet is told to others.

Imports no torch.
"""

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path

from hotset.errors import ConfigError

_LEAST_BYTES, _MOST_BYTES = 16, 4096


def read_secret(path: Path) -> bytes:
    """The secret of a file, without white space around it.

    Raises:
        ConfigError: it cannot be read, others may read it, or it is too short or too long.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(_MOST_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(f"the fleet secret {path} cannot be read: {error.strerror}") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(
            f"the fleet secret {path} can be read by other users; run: chmod 600 {path}"
        )
    if not _LEAST_BYTES <= len(secret) <= _MOST_BYTES:
        raise ConfigError(
            f"the fleet secret {path} has {len(secret)} bytes; expected {_LEAST_BYTES} to "
            f"{_MOST_BYTES}, such as: openssl rand -hex 32 > {path}"
        )
    return secret


def secret_of(folder: Path) -> Path:
    """The file of the secret in a folder."""
    return folder / "secret"


def own_secret(folder: Path) -> bytes:
    """The secret that all fleet processes of a user share; the first of them makes it.

    Args:
        folder: exists, and is the user's alone.

    Raises:
        ConfigError: it cannot be made or read.
    """
    path = secret_of(folder)
    if not path.exists():
        try:
            _make(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be made: {error.strerror}") from error
    return read_secret(path)


def _make(path: Path) -> None:
    """A file with a new secret, unless another process has just made one."""
    handle, name = tempfile.mkstemp(dir=path.parent)  # the user's alone
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
