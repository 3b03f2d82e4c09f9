"""Replicas over a tiny model, in processes of their own."""

import subprocess
import sys
from pathlib import Path

_CODE = """
import sys
sys.path.insert(0, {tests!r})
import tiny_engine
from hotset.cli import running_replica
from hotset.engine.process import EngineProcess
running_replica.EngineProcess = lambda options, _, on_report: EngineProcess(
    options, tiny_engine.build, on_report
)
from hotset.cli import main
main()
"""


class ReplicaProcess:
    """`hotset replica` over the tiny model; returns once it serves.

    Attributes:
        said: lines of its standard error so far.
        address: for links.
    """

    def __init__(self, folder: Path, *args: str) -> None:
        code = _CODE.format(tests=str(Path(__file__).parent))
        command = [sys.executable, "-c", code, "replica", "--directory", str(folder)]
        command += ["--hot-gib", "0.01", *args]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("serving "):
                self.address = line.split()[3]
                return
        raise AssertionError("".join(self.said))

    def end(self) -> str:
        """Wait for its end; what it said since it serves."""
        _, rest = self.process.communicate(timeout=60)
        return str(rest)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
