"""Model folders that are made once and kept in the user's cache, each file with its checksum."""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hotset.errors import ModelError
from hotset.foreign_text import parse_json

CHECKSUMS = "checksums.json"  # file name -> [bytes, BLAKE2b-256]


def ensure(target: Path, make: Callable[[Path], Path], what: str) -> Path:
    """Return `target`, made first where it does not hold what its checksums say.

    Every start reads all files and compares their checksums: a damaged copy is replaced, never
    used. Processes that make it at once each finish; the first one's stays.

    Args:
        target: where it is kept.
        make: makes the folder within the empty one it is given, and returns it.
        what: for messages.

    Raises:
        ModelError: it cannot be kept, or whatever `make` raises. No partial folder is left in its
            place.
    """
    if _verifies(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            made = make(Path(scratch))
            (made / CHECKSUMS).write_text(json.dumps(_checksums(made), indent=1) + "\n")
            _put(made, target, Path(scratch))
    except OSError as error:
        raise ModelError(f"cannot keep {what} in {target}: {error}") from error
    size_bytes = sum(size for size, _ in _checksums(target).values())
    print(f"hotset: kept {size_bytes / 1e6:.0f} MB in {target}", file=sys.stderr)
    return target


def _put(made: Path, target: Path, scratch: Path) -> None:
    if not _verifies(target):
        with contextlib.suppress(FileNotFoundError):  # there was none, or another process moved it
            target.rename(scratch / "damaged")
    try:
        made.rename(target)
    except OSError:
        if not _verifies(target):  # else another process was first: the same files
            raise


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
        listed = parse_json((kept / CHECKSUMS).read_bytes())
        sizes = {name: size for name, (size, _) in listed.items()}
        if {f.name: f.stat().st_size for f in kept.iterdir() if f.name != CHECKSUMS} != sizes:
            return False
        return {name: tuple(entry) for name, entry in listed.items()} == _checksums(kept)
    except (OSError, ValueError, TypeError, AttributeError):
        return False
