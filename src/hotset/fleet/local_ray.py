"""Ray on one machine, in two parts: what it knows, and where replicas run.

The head may end and start again within an hour: it keeps what it knows on disk, and the node with
the replicas goes on meanwhile. On one node they would end together.
"""

import contextlib
import importlib.util
import os
import secrets
import socket
import sys
from pathlib import Path

from hotset.errors import ConfigError
from hotset.fleet.child import Child

# A loopback address that Ray does not take for a name of this machine.
_HOST = "127.0.0.2"
_HEADLESS_S = 3600
_STORE_BYTES = 80_000_000  # the least that Ray takes: no token passes through it


def require_ray() -> None:
    """Raises ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "hotset fleet runs replicas by Ray, which is not installed; run: pip install "
            "'hotset[fleet]'"
        )


class LocalRay:
    """Starts the processes of a Ray of our own; they end with this one.

    Some of them listen on all addresses of the machine, whatever Ray is told: only those who have
    its token, which is made here, are answered.

    Args:
        folder: for its files, with a short path; need not be there.
        logs: folder for what it says.
    """

    def __init__(self, folder: Path, logs: Path) -> None:
        self._folder, self._logs = folder, logs
        self._port, self._client_port = _free_ports(2)
        inherited = {name: text for name, text in os.environ.items() if name != "HOTSET_API_KEYS"}
        self.env = {
            **inherited,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "head"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(_HEADLESS_S),
        }

    @property
    def address(self) -> str:
        """Of the head."""
        return f"{_HOST}:{self._port}"

    def start_head(self) -> Child:
        """Start the head, or start it again."""
        # Or it takes the head that has ended for one that lives.
        (self._folder / "ray_current_cluster").unlink(missing_ok=True)
        return self._start(
            "ray-head",
            "--head",
            f"--port={self._port}",
            f"--ray-client-server-port={self._client_port}",  # the usual one may be another Ray's
            f"--temp-dir={self._folder}",
            "--include-dashboard=false",
            "--num-cpus=0",
            "--num-gpus=0",
        )

    def start_node(self) -> Child:
        """Start the node where replicas run; raises EngineError. The head answers by then."""
        return self._start("ray-node", f"--address={self.address}", "--num-cpus=1000")

    def deploy(self, arguments: Path) -> Child:
        """Start replicas by the arguments in a file, or change them; see `deploy`."""
        argv = [sys.executable, "-m", "hotset.fleet.deploy", self.address, str(arguments)]
        return Child("the deployment", argv, self._logs / "deploy.log", env=self.env)

    def head_answers(self) -> bool:
        """Whether the head takes connections."""
        try:
            socket.create_connection((_HOST, self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def _start(self, name: str, *flags: str) -> Child:
        argv = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={_HOST}"]
        argv += [*flags, f"--object-store-memory={_STORE_BYTES}", "--block"]
        return Child(name, argv, self._logs / f"{name}.log", env=self.env)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in free:
            one.bind((_HOST, 0))
        return [one.getsockname()[1] for one in free]
