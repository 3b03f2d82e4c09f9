"""The disk tier's index: which slot holds which block, in SQLite, kept through a crash."""

import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from hotset.clock import REAL_CLOCK, Clock
from hotset.errors import TierError

MAX_KEY_BYTES = 64
BATCH_ROWS = 64  # most rows added, and most removed, by one transaction
ROW_BYTES = 256  # upper bound: 64 of key, about 24 of the rest, in pages at worst half full
_PAGE_BYTES = 4096
_CHECKPOINT_PAGES = 256
# Fixed part of the index: schema pages, and a log of _CHECKPOINT_PAGES plus one transaction.
BASE_BYTES = 16 * _PAGE_BYTES + 2**21
_RETRY_S = 10.0

_SCHEMA = (
    "CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE blocks (slot INTEGER PRIMARY KEY, key BLOB NOT NULL,"
    " checksum INTEGER NOT NULL, seq INTEGER NOT NULL)",
)


class Row(NamedTuple):
    """One stored block. `seq` grows with every block written."""

    slot: int
    key: bytes
    checksum: int
    seq: int


class IndexFault(Exception):
    """The index could not be changed. What was asked is not done and may be asked again."""


class BlockIndex:
    """Rows by slot, in memory and in an SQLite file. Safe from any thread; every call may block.

    Added rows are committed in batches: losing the last ones costs a recompute. Removals are
    committed before the call returns: a slot is written only when no committed row names it, so
    that after `kill -9` every row there is names a block that verifies.

    `synchronous=NORMAL` in WAL mode: no fsync at a commit, two at a checkpoint. A power cut may
    undo the last commits but leaves a sound database (`OFF` may not). A removal undone in that
    way leaves a row for a slot with other content, which its checksum catches.

    A file that turns out unusable is written anew from memory, at most once in 10 seconds.

    Args:
        path: of the SQLite file.
        identity: what a file must have been made for to be used; otherwise it is made anew.
        num_slots: rows of slots from here on are dropped.
        max_bytes: of the file and its log together.
        clock: of the pause after a file that failed.

    Attributes:
        rows: what is stored. Changed under the lock only.
        dropped: rows found of slots beyond `num_slots`.
        empty_reason: why nothing of an existing file was used, or None.
        damaged: whether that reason was damage and not another identity.
        num_failures: how often a change to the file failed.

    Raises:
        TierError: another program has the file open, or it cannot be created.
    """

    def __init__(
        self,
        path: Path,
        *,
        identity: Mapping[str, str],
        num_slots: int,
        max_bytes: int,
        clock: Clock = REAL_CLOCK,
    ) -> None:
        self._path = path
        self._identity = dict(identity)
        self._max_pages = (max_bytes - 2**21) // _PAGE_BYTES
        self._lock = threading.Lock()
        self._pending: dict[int, Row] = {}  # in rows, not yet in the file
        self._db: sqlite3.Connection | None = None
        self._retry_s = 0.0
        self._clock = clock
        self._next_seq = 0
        self.rows: dict[int, Row] = {}
        self.dropped: list[Row] = []
        self.empty_reason: str | None = None
        self.damaged = False
        self.num_failures = 0
        try:
            if path.exists():
                self._load(num_slots)
            else:
                self._create()
        except (sqlite3.Error, OSError) as error:
            self._disconnect()
            raise TierError(f"disk tier index {path} cannot be used: {error}") from error

    def _connect(self, path: Path, journal_mode: str) -> sqlite3.Connection:
        """Open the file; `self._db` is set even when a pragma then fails, to be closed."""
        self._db = db = sqlite3.connect(
            path, timeout=1.0, isolation_level=None, check_same_thread=False
        )
        db.execute(
            "PRAGMA locking_mode = EXCLUSIVE"
        )  # no -shm file, and no locks of other processes
        db.execute(f"PRAGMA journal_mode = {journal_mode}")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA max_page_count = {self._max_pages}")
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _load(self, num_slots: int) -> None:
        try:
            db = self._connect(self._path, "WAL")
            [(verdict,)] = db.execute("PRAGMA quick_check(1)").fetchall()
            found = dict(db.execute("SELECT name, value FROM identity"))
            rows = db.execute("SELECT slot, key, checksum, seq FROM blocks ORDER BY seq").fetchall()
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            self.empty_reason, self.damaged = f"the index was damaged ({error})", True
        else:
            valid = all(
                isinstance(slot, int)
                and slot >= 0
                and isinstance(key, bytes)
                and isinstance(checksum, int)
                and isinstance(seq, int)
                for slot, key, checksum, seq in rows
            )
            if verdict != "ok" or not valid:
                self.empty_reason, self.damaged = "the index was damaged", True
            elif found != self._identity:
                names = sorted(found.keys() | self._identity.keys())
                changes = [
                    f"{name} was {found.get(name)}, is {self._identity.get(name)}"
                    for name in names
                    if found.get(name) != self._identity.get(name)
                ]
                self.empty_reason = f"{len(rows)} blocks were of another kind: {'; '.join(changes)}"
            else:
                self.rows = {row[0]: Row(*row) for row in rows if row[0] < num_slots}
                self.dropped = [Row(*row) for row in rows if row[0] >= num_slots]
                self._next_seq = rows[-1][3] + 1 if rows else 0
                if not self.dropped:
                    return
        self._create()

    def _create(self) -> None:
        """Write the file anew from `self.rows`: aside, then moved into place.

        Without a log, which could grow past the size bound.
        """
        self._disconnect()
        new_path = self._path.with_name(self._path.name + ".new")
        for path in (self._path, new_path):
            for suffix in ("-wal", "-shm", "-journal", ""):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        # SQLite would create it readable by all; the keys tell what users asked.
        os.close(os.open(new_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        db = self._connect(new_path, "MEMORY")
        db.execute("BEGIN")
        for statement in _SCHEMA:
            db.execute(statement)
        db.executemany("INSERT INTO identity VALUES (?, ?)", self._identity.items())
        db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", self.rows.values())
        db.execute("COMMIT")
        self._disconnect()
        new_path.replace(self._path)
        self._connect(self._path, "WAL")
        self._pending.clear()

    def add(self, slot: int, key: bytes, checksum: int) -> Row:
        """Add the row of a block that is in its slot; committed later, by `flush` or in a batch."""
        assert len(key) <= MAX_KEY_BYTES, len(key)
        with self._lock:
            assert slot not in self.rows, slot
            row = Row(slot, key, checksum, self._next_seq)
            self._next_seq += 1
            self.rows[slot] = self._pending[slot] = row
            return row

    @property
    def batch_is_full(self) -> bool:
        """Whether it is time to `flush`."""
        return len(self._pending) >= BATCH_ROWS

    def flush(self) -> None:
        """Commit the rows added. Raises IndexFault; they stay pending."""
        with self._lock:
            if self._pending:
                self._commit(())

    def remove(self, slots: Iterable[int]) -> None:
        """Remove the rows of `slots`, where there are any, and commit.

        Raises:
            IndexFault: the rows are still there; the slots must not be written.
        """
        with self._lock:
            stale = [slot for slot in slots if slot in self.rows]
            if stale:
                self._commit(stale)
                for slot in stale:
                    del self.rows[slot]

    def _commit(self, removed: Iterable[int]) -> None:
        try:
            if self._db is None:
                if self._clock.now() < self._retry_s:
                    raise IndexFault("waiting to try again")
                self._create()
            assert self._db is not None
            rows = list(self._pending.values())
            # More than a batch only after a failure; split, so that the log stays small.
            for first in range(0, max(len(rows), 1), BATCH_ROWS):
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(
                    "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)",
                    rows[first : first + BATCH_ROWS],
                )
                if first + BATCH_ROWS >= len(rows):
                    self._db.executemany(
                        "DELETE FROM blocks WHERE slot = ?", ((slot,) for slot in removed)
                    )
                self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self.num_failures += 1
            self._retry_s = self._clock.now() + _RETRY_S
            self._disconnect()
            raise IndexFault(str(error)) from error
        self._pending.clear()

    def close(self) -> None:
        """Commit, fold the log into the file and close it. Raises IndexFault, and is closed."""
        with self._lock:
            try:
                if self._pending:
                    self._commit(())
                if self._db is not None:
                    self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error as error:
                self.num_failures += 1
                raise IndexFault(str(error)) from error
            finally:
                self._disconnect()
