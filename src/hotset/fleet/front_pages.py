"""What the fronts of one machine say of themselves, in a folder, for each of them to show."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from hotset.foreign_text import ForeignTextError, parse_json

Json = dict[str, Any]

_LIVES_S = 10.0


class FrontPages:
    """Fronts share a port, so a client that asks one is to hear of all.

    A front writes its page again and again; one that is older than 10 s is of a front that is gone.
    For any thread.

    Args:
        folder: the same for all fronts of a fleet; made where it is missing, for this user alone.
        front_id: another one for each front.

    Raises:
        OSError: there can be no such folder.
    """

    def __init__(self, folder: Path, front_id: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._own = folder / f"{front_id}.json"

    def write(self, page: Json) -> None:
        """Replace this front's page, whole. Raises OSError; the earlier page stays."""
        new = self._own.with_suffix(".new")
        new.write_text(json.dumps(page), "utf-8")
        os.replace(new, self._own)

    def others(self) -> list[Json]:
        """The pages of the other fronts that live; those that cannot be read are left out."""
        oldest_s = time.time() - _LIVES_S
        found = []
        for path in sorted(self._own.parent.glob("*.json")):
            with contextlib.suppress(OSError, ForeignTextError):
                if path != self._own and path.stat().st_mtime > oldest_s:
                    found.append(parse_json(path.read_bytes()))
        return found

    def close(self) -> None:
        """Take the page away."""
        self._own.unlink(missing_ok=True)
