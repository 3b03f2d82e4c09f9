"""A store for the replicas of one machine: a server of the Redis protocol."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hotset.errors import TierError
from hotset.fleet.child import Child
from hotset.memory.remote.resp import Address, Connection, StoreError

_PROGRAMS = ("valkey-server", "redis-server")
_START_S, _STOP_S = 10.0, 5.0
_LEAST_BYTES = 16 * 2**20


@dataclass(eq=False, slots=True)
class LocalStore:
    """A server that runs. It ends with `close`, or with the process that started it.

    Attributes:
        url: for the option `remote`.
        program: what runs.
        launch: starts it again, empty, where it has ended; it answers soon.
    """

    url: str
    program: str
    launch: Callable[[], Child]
    process: Child

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.process.is_alive

    def close(self) -> None:
        """End it; what it stored is gone. Idempotent."""
        self.process.end(_STOP_S)


def socket_of(folder: Path) -> Path:
    """Where the store of a folder listens."""
    return folder.resolve() / "store.sock"


def start_store(folder: Path, num_bytes: int) -> LocalStore | None:
    """Start a store that this user's processes on this machine can reach, and nobody else.

    It listens at a Unix socket in `folder`, at no port; takes at most `num_bytes`, evicting what
    was used longest ago; and writes nothing to disk but its log.

    Args:
        folder: exists, and is the user's alone.
        num_bytes: 16 MiB or more.

    Returns:
        The store; None where neither valkey-server nor redis-server is installed.

    Raises:
        TierError: it does not start, or `num_bytes` is too few.
    """
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        return None
    if num_bytes < _LEAST_BYTES:
        raise TierError(
            f"a store of {num_bytes} bytes is too small; expected {_LEAST_BYTES} or more"
        )
    path, log = socket_of(folder), folder / "store.log"
    words = ["--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700", "--save", ""]
    words += ["--appendonly", "no", "--dir", str(path.parent), "--loglevel", "warning"]
    words += ["--maxmemory", str(num_bytes), "--maxmemory-policy", "allkeys-lru"]
    log.unlink(missing_ok=True)

    def launch() -> Child:
        path.unlink(missing_ok=True)
        return Child("the store", [program, *words], log)

    store = LocalStore(f"unix://{path}", Path(program).name, launch, launch())
    until_s = time.monotonic() + _START_S
    while not _answers(store, until_s):
        if not store.is_alive or time.monotonic() > until_s:
            store.close()
            said = log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise TierError(f"{program} did not start: {said or 'it said nothing'}")
        time.sleep(0.01)
    return store


def _answers(store: LocalStore, until_s: float) -> bool:
    try:
        Connection(Address.of(store.url), until_s).close()
    except StoreError:
        return False
    return True
