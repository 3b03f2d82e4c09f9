"""A group of ranks, joined and left."""

import subprocess
import sys

_JOIN_AND_LEAVE = """
import torch
from pathlib import Path
from hotset.layout import Layout
from hotset.parallel import group
names = lambda: [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
group.join(group.serve_store(1, 60), 0, Layout(), "cpu", 60)
torch.distributed.all_reduce(torch.ones(4))
import torch.distributed.nn.functional  # as a model does: its functions have the group as a default
print(*names())
group.leave()
print(*names())
"""


def test_a_group_that_is_left_has_no_thread_that_the_end_of_python_would_meet() -> None:
    words = [sys.executable, "-c", _JOIN_AND_LEAVE]
    joined, left = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split(
        "\n", 1
    )
    assert "pt_gloo_runloop" in joined
    assert "gloo" not in left
