"""Keeping the libraries underneath quiet, and their errors to a line."""

import contextlib
import warnings
from collections.abc import Iterator

import huggingface_hub
import transformers

_MOST_CHARACTERS = 400  # transformers lists all that it knows


def first_line(error: Exception) -> str:
    """The first line of an error's message that says anything, and what it announces.

    What is longer than 400 characters is cut.
    """
    if isinstance(error, KeyError):  # its message is the key alone
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings and progress bars off the user's terminal.

    hotset checks for the conditions that matter, and raises its own errors.
    """
    logging, hub_logging = transformers.utils.logging, huggingface_hub.logging
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()  # the hub's too
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if had_bars:
            logging.enable_progress_bar()
