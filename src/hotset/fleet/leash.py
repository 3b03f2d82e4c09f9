"""Becomes another program that ends when the process that started it does, however that ends.

    python -m hotset.fleet.leash PARENT_PID PROGRAM [ARGUMENT ...]

Linux only: elsewhere the program runs without it. The kernel's mark stays through `exec`, and
counts the end of the parent's *thread* that started this one as well.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """See above. Raises OSError: there is no such program."""
    parent, *program = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it ended before the mark was made
            sys.exit(1)
    os.execvp(program[0], program)


if __name__ == "__main__":
    main()
