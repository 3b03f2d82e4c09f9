"""JSON files that a user names."""

from pathlib import Path
from typing import Any

from hotset.errors import PlanError
from hotset.foreign_text import ForeignTextError, parse_json


def read_json(path: Path, what: str) -> Any:
    """What a file says.

    Raises:
        PlanError: it cannot be read, or is no JSON; the message begins with `what` and the path.
    """
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise PlanError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except ForeignTextError as error:
        raise PlanError(f"{what} {path} {error}") from error
