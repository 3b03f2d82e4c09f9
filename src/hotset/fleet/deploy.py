"""Starts the replicas of `hotset fleet` in its Ray, or changes them, and ends.

    python -m hotset.fleet.deploy ADDRESS ARGUMENTS.json

A process that stays connected to Ray ends 60 s after its head does, so this is one of its own.
"""

import sys
from pathlib import Path

from hotset.fleet.app import build
from hotset.foreign_text import parse_json

APP = "hotset"


def main() -> None:
    """See above. Returns once all replicas serve; raises RuntimeError where they cannot."""
    import ray
    from ray import serve

    address, path = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="warning")
    serve.start(proxy_location="Disabled")
    serve.run(build(parse_json(Path(path).read_bytes())), name=APP, route_prefix=None)


if __name__ == "__main__":
    main()
