"""A folder that a store has for itself while it is open."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hotset.errors import TierError
from hotset.memory.disk.slab import FolderLock


@contextmanager
def opening(folder: Path, what: str) -> Iterator[tuple[FolderLock, ExitStack]]:
    """Make and lock a folder, for a store to be opened in the block.

    Args:
        folder: created where missing, readable by the user only.
        what: the store and its folder, as an error calls it.

    Yields:
        the lock, which stays after the block; and what to undo where the block fails, to be added
        to. The lock is undone, too.

    Raises:
        TierError: another process has the folder; or the block raised an OSError.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as undo:
            lock = FolderLock(folder)
            undo.callback(lock.close)
            yield lock, undo
            undo.pop_all()
    except OSError as error:
        raise TierError(
            f"{what} cannot be used: {error.strerror or error}; give a folder that can be written"
        ) from error
