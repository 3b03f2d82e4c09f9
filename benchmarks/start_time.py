r"""Seconds from `hotset serve` to the first token, the first time on a machine and the second.

The first start finds nothing that another one compiled: FlashInfer, Triton and PyTorch keep what
they compile in an empty folder. The second finds what the first left. Options after `--` are those
of `hotset serve`; the checkpoint should be on local disk.

    python benchmarks/start_time.py --out benchmarks/results/start_time_h200.json -- \
        --model FOLDER --hot-gib 16 --host-gib 64 --max-model-len 12288
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import record

_LIMIT_S = 600.0
_ASK_EVERY_S = 0.25
_WARMING = "serving while more steps are recorded"
_WARM = "warm: all kernels built"
# How long to wait for that line once the first token is there.
_WARM_LIMIT_S = 180.0


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("serve", nargs="+", help="options of hotset serve, after --")
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as kept:
        for _ in range(options.starts):
            runs.append(start(options.serve, options.port, Path(kept)))
            print(json.dumps(runs[-1]), flush=True)
    record.write(options.out, record.start(starts=runs))


def start(serve: list[str], port: int, kept: Path) -> dict[str, Any]:
    """Start a server, ask for one token until it is there, stop the server."""
    environment = os.environ | {
        "FLASHINFER_WORKSPACE_BASE": str(kept),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
    }
    command = [sys.executable, "-m", "hotset", "serve", "--port", str(port), *serve]
    begin_s = time.perf_counter()
    server = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines: list[tuple[float, str]] = []
    reader = threading.Thread(target=_read, args=(server, begin_s, lines), daemon=True)
    reader.start()
    try:
        while not (answers := _answers(port)):
            if server.poll() is not None or time.perf_counter() - begin_s > _LIMIT_S:
                break
            time.sleep(_ASK_EVERY_S)
        first_s = time.perf_counter() - begin_s if answers else None
        give_up_s = time.perf_counter() + _WARM_LIMIT_S
        is_warming = any(_WARMING in line for _, line in lines)
        while answers and is_warming and time.perf_counter() < give_up_s:
            if any(_WARM in line for _, line in lines):
                break
            time.sleep(0.1)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
    texts = [line for _, line in lines]
    begin = next((i for i, line in enumerate(texts) if line.startswith("start: ")), len(texts))
    phases = [line for line in texts[begin : begin + 14] if line.startswith(("start: ", "  "))]
    return {
        "first_token_s": first_s,
        "warm_s": next((seconds for seconds, line in lines if _WARM in line), None),
        "phases": phases,
        "errors": [line for line in texts if "error" in line.lower()],
    }


def _read(server: "subprocess.Popen[str]", begin_s: float, lines: list[tuple[float, str]]) -> None:
    assert server.stderr is not None
    for line in server.stderr:
        lines.append((time.perf_counter() - begin_s, line.rstrip()))


def _answers(port: int) -> bool:
    """Whether the first token of an answer comes."""
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 4, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status == 200 and answer.readline().startswith(b"data: {")
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main()
