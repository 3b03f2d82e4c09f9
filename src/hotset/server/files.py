"""Files that clients keep here for batches: each tenant sees its own only."""

import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hotset.errors import ConfigError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.server.body import Json
from hotset.server.errors import ApiError, not_found

_log = logging.getLogger(__name__)

_ID = re.compile(r"(file|batch)-[0-9a-f]{32}")
_ANYBODY = "_"  # no key has this name


class FileStore:
    """A folder with a folder for each tenant: `ID.json` says what `ID.data` is.

    A file is there once its `.json` is, which is written last and replaced as a whole.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: Path, *, max_tenant_bytes: int) -> None:
        self._folder = folder
        self._max_tenant_bytes = max_tenant_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"the folder for files cannot be made: {folder}: {error.strerror}; "
                "choose another files_path"
            ) from error

    def tenants(self) -> list[str]:
        """Names of the tenants that have or had files here."""
        names = sorted(path.name for path in self._folder.iterdir() if path.is_dir())
        return ["" if name == _ANYBODY else name for name in names]

    def data_path(self, tenant: str, file_id: str) -> Path:
        """Where the content of a file is, or may be put. Raises ApiError (404): no id."""
        return self._path(tenant, file_id, "data")

    def add(self, tenant: str, source: IO[bytes], *, filename: str, purpose: str) -> Json:
        """Keep a copy of `source`; returns the file's object. Raises ApiError: no room."""
        file_id = f"file-{uuid.uuid4().hex}"
        path = self.data_path(tenant, file_id)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        size = source.seek(0, os.SEEK_END)
        source.seek(0)
        used = sum(entry.stat().st_size for entry in path.parent.iterdir())
        if used + size > self._max_tenant_bytes:
            raise ApiError(
                413,
                f"your files take {used} bytes and this one {size}; {self._max_tenant_bytes} are "
                "allowed: delete some",
                code="files_full",
            )
        with path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return self.put_file(tenant, file_id, filename=filename, purpose=purpose)

    def put_file(self, tenant: str, file_id: str, *, filename: str, purpose: str) -> Json:
        """Announce a file whose data is there already."""
        return self.put(
            tenant,
            {
                "id": file_id,
                "object": "file",
                "bytes": self.data_path(tenant, file_id).stat().st_size,
                "created_at": int(time.time()),
                "filename": filename,
                "purpose": purpose,
                "status": "processed",
            },
        )

    def put(self, tenant: str, entry: Json) -> Json:
        """Keep an object by its `id`, at once or not at all."""
        path = self._path(tenant, entry["id"], "json")
        path.parent.mkdir(exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as scratch:
            json.dump(entry, scratch)
            scratch.flush()
            os.fsync(scratch.fileno())
        os.replace(scratch.name, path)
        return entry

    def get(self, tenant: str, entry_id: str) -> Json:
        """The object of an id. Raises ApiError (404): it is not there, or another's."""
        try:
            entry: Json = parse_json(self._path(tenant, entry_id, "json").read_bytes())
        except FileNotFoundError:
            raise _not_found(entry_id) from None
        except ForeignTextError as error:
            raise ApiError(500, f"what is kept of {entry_id} {error}") from error
        return entry

    def list(self, tenant: str, kind: str) -> list[Json]:
        """All objects of a kind (`file` or `batch`), newest first."""
        entries = list(self._entries(tenant, kind))
        return sorted(entries, key=lambda entry: (-entry["created_at"], entry["id"]))

    def delete(self, tenant: str, file_id: str) -> None:
        """Forget a file. Raises ApiError (404): it is not there."""
        self.get(tenant, file_id)
        self._path(tenant, file_id, "json").unlink(missing_ok=True)
        self.data_path(tenant, file_id).unlink(missing_ok=True)

    def _entries(self, tenant: str, kind: str) -> Iterator[Json]:
        for path in (self._folder / (tenant or _ANYBODY)).glob(f"{kind}-*.json"):
            try:
                yield parse_json(path.read_bytes())
            except ForeignTextError as error:
                _log.warning("%s is left out: it %s", path, error)

    def _path(self, tenant: str, entry_id: str, suffix: str) -> Path:
        if not _ID.fullmatch(entry_id):  # also keeps paths out of the id
            raise _not_found(entry_id)
        return self._folder / (tenant or _ANYBODY) / f"{entry_id}.{suffix}"


def _not_found(entry_id: str) -> ApiError:
    return not_found(f"there is no {entry_id[:80]!r}")
