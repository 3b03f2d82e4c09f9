"""Which replicas there are, as a folder of entries on one machine. Imports no torch.

A replica writes its entry each 2 s; one that is older than 10 s is of a replica that has ended.
That a link goes on is the better sign of life: the folder says whom to try.
"""

import logging
import os
import stat
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import platformdirs

from hotset.errors import ConfigError

_log = logging.getLogger(__name__)

_WRITE_EVERY_S = 2.0
_LIVES_S = 10.0
_SWEEP_S = 60.0  # after which another replica removes what one has left
_SUFFIX = ".json"
_MOST_BYTES = 2**16


class Entry(msgspec.Struct, frozen=True):
    """What a replica tells those who look for one.

    Attributes:
        address: see `Address.of`.
        pid: of the process, on its machine.
        model: its name.
        fingerprint: of the weights, as `LoadedModel` has it.
        numerics: of all that KV blocks and answers depend on beside tokens, shortened; equal where
            they can be exchanged.
        wire_versions: that its link speaks.
        is_draining: it takes no more requests.
        load: numbers of `engine.messages.Load` by name; empty before the first.
    """

    replica_id: str
    address: str
    pid: int
    model: str
    fingerprint: str
    numerics: str
    wire_versions: tuple[int, ...]
    is_draining: bool = False
    load: dict[str, float] = {}


_decoder = msgspec.json.Decoder(Entry)


def default_folder() -> Path:
    """The folder of the fleet that a user's processes make on this machine."""
    return Path(platformdirs.user_runtime_dir("hotset", appauthor=False)) / "fleet"


def make_private(folder: Path) -> None:
    """Make a folder that only its user can use, or see that nobody else can write there.

    Raises:
        ConfigError: it cannot be made, or others can write there.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror}") from error
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"the folder {folder} can be changed by other users; choose one of your own, or run: "
            f"chmod 700 {folder}"
        )


class Registration:
    """Keeps an entry in a folder until it is closed.

    Args:
        folder: see `make_private`.
        entry: of a replica that serves.

    Raises:
        ConfigError: a living replica has the same id, or the entry cannot be written.
    """

    def __init__(self, folder: Path, entry: Entry) -> None:
        self._path = folder / f"{entry.replica_id}{_SUFFIX}"
        self._entry = entry
        self._is_over = threading.Event()
        self._lock = threading.Lock()  # of the file
        _sweep(folder)
        other = _read(self._path)
        if other is not None and other.pid != entry.pid:
            raise ConfigError(
                f"replica id {entry.replica_id} is in use by process {other.pid}, by {self._path}; "
                "choose another id"
            )
        try:
            self._write()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="hotset-entry", daemon=True)
        self._thread.start()

    def set_load(self, load: dict[str, float]) -> None:
        """Change the load, as of the next time that the entry is written."""
        self._entry = msgspec.structs.replace(self._entry, load=load)

    def set_draining(self) -> None:
        """Say at once that the replica takes no more requests."""
        self._entry = msgspec.structs.replace(self._entry, is_draining=True)
        self._try_to_write()

    def close(self) -> None:
        """Remove the entry. Idempotent."""
        self._is_over.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._is_over.wait(_WRITE_EVERY_S):
            self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:  # links go on without it
            _log.warning("%s cannot be written: %s", self._path, error.strerror)

    def _write(self) -> None:
        """Put the entry in place of the older one, whole."""
        with self._lock:
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=".entry-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(msgspec.json.encode(self._entry))
                os.replace(name, self._path)
            except OSError:
                os.unlink(name)
                raise


class Directory:
    """Reads the entries of a folder.

    Args:
        folder: of entries; need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: tuple[Entry, ...] = ()
        self._is_lost = False

    def entries(self) -> tuple[Entry, ...]:
        """Of the replicas that live, by id. While the folder is out of reach, the last list."""
        try:
            paths = sorted(self._folder.glob(f"*{_SUFFIX}")) if self._folder.stat() else []
        except OSError as error:
            if not self._is_lost:
                _log.warning("%s cannot be read: %s", self._folder, error.strerror)
            self._is_lost = True
            return self._last
        self._is_lost = False
        found = (_read(path) for path in paths)
        self._last = tuple(entry for entry in found if entry is not None)
        return self._last


def _read(path: Path) -> Entry | None:
    """An entry; None where it is too old, or is none, which costs nobody a link."""
    try:
        with path.open("rb") as file:
            if abs(time.time() - os.fstat(file.fileno()).st_mtime) > _LIVES_S:
                return None
            entry = _decoder.decode(file.read(_MOST_BYTES))
    except (OSError, msgspec.DecodeError, RecursionError):
        return None
    return entry if entry.replica_id == path.name.removesuffix(_SUFFIX) else None


def _sweep(folder: Path) -> None:
    """Remove what replicas that were killed have left, and the sockets beside it.

    A socket that is newer than the entry is of a successor, which may still be loading its model.
    """
    for path in (*folder.glob(f"*{_SUFFIX}"), *folder.glob(".entry-*")):
        try:
            written_s = path.stat().st_mtime
            if time.time() - written_s > _SWEEP_S:
                path.unlink()
                for socket in (path.with_suffix(".sock"), path.with_suffix(".peer")):
                    if socket.exists() and socket.stat().st_mtime < written_s:
                        socket.unlink()
        except OSError:
            continue  # another process was faster
