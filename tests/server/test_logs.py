"""How the server logs."""

import json
import logging
import os
from collections.abc import Iterator

import pytest

from hotset.server import logs


@pytest.fixture
def _root() -> Iterator[None]:
    """What `set_up` changes is as before when the test ends."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_root")
@pytest.mark.parametrize("wanted", [None, "debug"])
def test_flashinfer_says_nothing_in_a_form_of_its_own_unless_asked_to(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHINFER_LOGGING_LEVEL", "")  # so that it is put back
    monkeypatch.delenv("FLASHINFER_LOGGING_LEVEL")
    if wanted is not None:
        monkeypatch.setenv("FLASHINFER_LOGGING_LEVEL", wanted)
    logs.set_up("json", "warning")
    assert os.environ["FLASHINFER_LOGGING_LEVEL"] == (wanted or "warning")
    logging.getLogger("hotset").warning("a line")
    assert json.loads(capsys.readouterr().err)["message"] == "a line"
