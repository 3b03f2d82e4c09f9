"""How many streamed tokens a second `hotset bench --against` can take: its client, no engine.

    python benchmarks/http_client.py --out benchmarks/results/http_client.json

Loads `instant_server.py`, which answers at once, from the client's own processes, as `--against`
does. `tokens_per_s` is what both reached together; `tokens_per_cpu_s` what one core of the client
takes, whatever the server does. With `--step-ms` a token of each stream comes so often, in a read
of its own, as from an engine; with 0 several come together.
"""

import json
import subprocess
import sys
from pathlib import Path

import record

from hotset.bench.against import Server
from hotset.bench.load import LoadProcesses, num_processes
from hotset.bench.workload import Spec, make_work


def main() -> None:
    parser = record.arguments(__doc__)
    parser.add_argument("--users", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument(
        "--server-processes", type=int, default=0, help="0: as many as the client's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    spec = Spec(
        "multiturn",
        users=options.users,
        turns=options.turns,
        first_tokens=512,
        new_tokens=64,
        output_tokens=options.output_tokens,
    )
    count = num_processes(options.users)
    script = str(Path(__file__).with_name("instant_server.py"))
    servers = str(options.server_processes or count)
    command = [sys.executable, script, "--processes", servers, "--step-ms", str(options.step_ms)]
    runs = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        load = LoadProcesses(count)
        try:
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            server = Server(url, model=None, key=None, vocab_size=32_000)
            server.find_out([7, 8])
            work = make_work(spec, server.vocab_size)
            for _ in range(options.repeats + 1):
                runs.append(_run(load, server, work))
                print(json.dumps(runs[-1]), flush=True)
        finally:
            load.close()
            process.kill()
    record.write(options.out, record.start(seed=spec.seed, runs=runs[1:]))


def _run(load: LoadProcesses, server: Server, work) -> dict:
    played = load.play(server.asking, work)
    play = played.play
    expected = sum(turn.output_tokens for session in work.sessions for turn in session.turns)
    assert (play.num_failed, play.output_tokens) == (0, expected), "tokens were lost"
    return {
        "client_processes": played.num_processes,
        "wall_s": round(played.wall_s, 3),
        "tokens": play.output_tokens,
        "tokens_per_s": round(play.output_tokens / played.wall_s),
        "tokens_per_cpu_s": round(play.output_tokens / played.cpu_s),
        "busiest_share_of_a_core": round(played.busiest, 3),
        "gap_ms": record.percentiles(play.gaps_s, of=(50, 99), scale=1e3, digits=3),
    }


if __name__ == "__main__":
    main()
