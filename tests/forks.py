"""Calls in a fork of the tests' process."""

import os
import signal
import warnings
from collections.abc import Callable
from typing import Any


def in_a_fork(call: Callable[[], Any]) -> str:
    """What a call raises in a fork of this process; `returned` where it does not."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: it has threads
        pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        try:
            call()
            answer = "returned"
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answers:
        answer = answers.read()
    os.waitpid(pid, 0)
    return answer or "killed"
