"""What the processes of a fleet write to their logs, as lines of one."""

import sys
import threading
from pathlib import Path
from typing import TextIO

_EVERY_S = 0.2
_MOST_BYTES = 1 << 20  # at once


class LogTail:
    """Copies what is added to the files of a folder, in a thread of its own.

    Args:
        folder: of files `NAME.log`, which may come, go, and be emptied.
        prefixes: begin each line with the name.
        to: where lines go; None is stderr.
    """

    def __init__(self, folder: Path, *, prefixes: bool, to: TextIO | None = None) -> None:
        self._folder = folder
        self._prefixes = prefixes
        self._to = sys.stderr if to is None else to
        self._left_out: set[str] = set()
        self._read: dict[Path, int] = {}  # bytes of each file
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hotset-tail", daemon=True)
        self._thread.start()

    def leave_out(self, *names: str) -> None:
        """Copy nothing of these."""
        self._left_out.update(names)

    def close(self) -> None:
        """Copy what there is and end. Idempotent."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_EVERY_S):
            self._copy()
        self._copy()

    def _copy(self) -> None:
        for path in sorted(self._folder.glob("*.log")):
            if path.stem not in self._left_out:
                try:
                    self._copy_one(path)
                except OSError:  # it is gone
                    self._read.pop(path, None)

    def _copy_one(self, path: Path) -> None:
        size, start = path.stat().st_size, self._read.get(path, 0)
        if size < start:
            start = 0
        if size == start:
            return
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(_MOST_BYTES)
        end = content.rfind(b"\n") + 1  # the last line may not be whole
        if not end and len(content) == _MOST_BYTES:
            end = len(content)
        self._read[path] = start + end
        prefix = f"{path.stem}: " if self._prefixes else ""
        for line in content[:end].decode(errors="replace").splitlines():
            self._to.write(f"{prefix}{line}\n")
        self._to.flush()
