"""`kill -9` at any moment leaves a store that opens and holds only blocks that verify."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disk_helpers import buffer, finish, has, opened

from hotset.memory.disk.tier import DiskTier

NUM_PAYLOADS = 40
PAYLOAD_BYTES = 3 * 4096
KEYS = 400

# Writes keys in random order for ever. A payload follows from its key, so that whoever reads it
# after the crash knows what it must be.
WRITER = f"""
import itertools, random, sys
sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}
from pathlib import Path
from disk_helpers import buffer, opened
from test_disk_crash import KEYS, NUM_PAYLOADS, PAYLOAD_BYTES, payload_of
payloads = []
for number in range(KEYS):
    view = buffer(PAYLOAD_BYTES)
    view[:] = payload_of(number)
    payloads.append(view)
with opened(Path(sys.argv[1]), NUM_PAYLOADS, payload_bytes=PAYLOAD_BYTES) as tier:
    print("opened", flush=True)
    written = 0
    choose = random.Random(int(sys.argv[2]))
    for turn in itertools.count():
        number = choose.randrange(KEYS)
        tier.submit_write(b"%d" % number, payloads[number])
        if turn % 16 == 0:
            tier.wait(10.0)
        written += len(tier.poll())
        if 200 < written < 10**9:  # so that rows were committed
            print("stored", flush=True)
            written = 10**9
"""


def payload_of(number: int) -> bytes:
    return hashlib.shake_128(b"%d" % number).digest(PAYLOAD_BYTES)


def stored_and_whole(tier: DiskTier) -> int:
    """Read every block there is; how many."""
    count = 0
    for number in range(KEYS):
        if has(tier, b"%d" % number):
            into = buffer(PAYLOAD_BYTES)
            assert finish(tier, tier.submit_read(b"%d" % number, into)).status.value == "ok"
            assert bytes(into) == payload_of(number)
            count += 1
    return count


@pytest.mark.parametrize("line", ["", "opened\n", "stored\n"])
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_leaves_only_blocks_that_verify(
    tmp_path: Path, seed: int, line: str
) -> None:
    """Killed while starting, soon after it opened the store, or while overwriting a full one."""
    moment = random.Random(f"{seed} {line}")
    for _ in range(2):  # the second writer starts on what the first one left
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        with writer.stdout:
            if line:
                assert line in iter(writer.stdout.readline, "")
            time.sleep(moment.uniform(0.0, 0.1 if line else 0.4))
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(10.0) == -signal.SIGKILL
        with opened(tmp_path, NUM_PAYLOADS, payload_bytes=PAYLOAD_BYTES) as tier:
            assert tier.reclaimed is None
            count = stored_and_whole(tier)
            assert tier.usage().used_payloads == count
            assert count > 0 or line != "stored\n"
            assert tier.usage().faults == {}
            tier.check()
