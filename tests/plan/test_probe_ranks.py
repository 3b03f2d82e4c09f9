"""Several GPUs measured together, with processes on the CPU in their place."""

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hotset.cli.probe import command
from hotset.cost.hardware import hardware_from_json, load_hardware
from hotset.cost.rates import Rates
from hotset.cost.together import together_from_json
from hotset.errors import ConfigError
from hotset.plan import probe as probes
from hotset.plan import probe_ranks as ranks
from hotset.plan.rank_times import Effort

LITTLE = Effort(sizes=(4096, 65_536), copy_bytes=2**20, figure_s=0.01)


@pytest.fixture(scope="module")
def measured() -> dict[str, object]:
    return ranks.probe_ranks("cpu", 2, LITTLE)


def test_two_ranks_measure_links_and_collectives_that_a_plan_reads(
    measured: dict[str, object],
) -> None:
    assert list(measured) == ["2"] and json.loads(json.dumps(measured)) == measured
    [together] = together_from_json(measured, "probe").values()
    assert together.link_bytes_per_s and together.source.startswith("hotset probe: 2 ranks")
    for points in (together.all_reduce, together.all_gather, together.reduce_scatter):
        assert [size for size, _ in points] == [4096, 65_536]
        assert all(seconds > 0 for _, seconds in points)
    links = measured["2"]["links_gb_per_s"]  # type: ignore[index]
    for way in ("up", "down", "both"):
        assert len(links[way]["alone"]) == len(links[way]["together"]) == 2
    slowest = min(min(links[way]["together"]) for way in ("up", "down"))
    assert together.link_bytes_per_s == pytest.approx(slowest * 1e9)
    assert multiprocessing.active_children() == []


def test_the_engine_takes_the_rate_that_all_links_have_together(
    measured: dict[str, object],
) -> None:
    chips = load_hardware("h200")
    alone, both, four = (
        Rates.of_hardware(chips, num_gpus=gpus).expert_bytes_per_s for gpus in (1, 2, 4)
    )
    assert both / alone == pytest.approx(53.9 / (64 * 0.86)) and four == alone


def test_an_error_of_a_rank_is_one_line_that_names_it_and_leaves_no_process() -> None:
    with pytest.raises(ConfigError, match=r"2 GPUs failed on rank [01]: .") as failed:
        ranks.probe_ranks("cpu", 2, Effort(sizes=(-2,), copy_bytes=1024, figure_s=0.01))
    assert "\n" not in str(failed.value)
    assert multiprocessing.active_children() == []


class _Abort(tuple[int, ...]):
    """Sizes that end the process that goes through them, as an error of C++ in a thread does."""

    def __iter__(self) -> Iterator[int]:
        print("a first line\nterminate called: a last line\n", file=sys.stderr, flush=True)
        os.abort()


def test_a_rank_that_a_signal_ends_is_named_with_the_last_line_of_its_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError) as failed:
        ranks.probe_ranks("cpu", 2, Effort(sizes=_Abort(), copy_bytes=1024, figure_s=0.01))
    line = r"the probe of 2 GPUs failed on rank [01]: .* signal SIGABRT: terminate called: a last l"
    assert re.match(line, str(failed.value)) and "\n" not in str(failed.value)
    assert "a first line" in capfd.readouterr().err  # all of it is there to read
    assert multiprocessing.active_children() == []


def test_ranks_that_take_too_long_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT_S", 0.5)  # less than a process takes to start
    with pytest.raises(ConfigError, match="took over 0 s and was ended; probe fewer"):
        ranks.probe_ranks("cpu", 2, LITTLE)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("device", "gpus", "line"),
    [
        ("cpu", 17, "gpus is 17; expected 1 to 16 processes on a CPU"),
        ("cpu", 0, "gpus is 0; expected 1 to 16 processes on a CPU"),
        ("cuda", 2, "gpus is 2, and this machine has 1; expected 1 to 1"),
    ],
)
def test_more_gpus_than_there_are_is_one_line(
    device: str, gpus: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError) as refused:
        ranks.check_gpus(device, gpus)
    assert str(refused.value) == line


def test_the_command_writes_a_profile_of_both_and_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: dict[str, object]
) -> None:
    monkeypatch.setattr(probes, "SHARE_S", 0.01)
    asked: list[tuple[str, int]] = []

    def stored(device: str, gpus: int) -> dict[str, object]:
        asked.append((device, gpus))
        return measured

    monkeypatch.setattr(ranks, "probe_ranks", stored)
    path = tmp_path / "mine.json"
    words = ["--device", "cpu", "--no-disk", "--gpus", "2", "--output", str(path)]
    shown = CliRunner().invoke(command, words, catch_exceptions=False).output
    assert asked == [("cpu", 2)]
    chips = hardware_from_json(json.loads(path.read_text()), "mine")
    assert chips.together == together_from_json(measured, "mine")
    for line in ("2 at once: host links, GB/s", "2 at once: collectives, us by size"):
        assert line in shown
    table = shown[shown.index("collectives, us") :]
    assert all(word in table for word in ("all-reduce", "all-gather", "reduce-scatter", "64 KiB"))
    [failed] = [CliRunner().invoke(command, ["--device", "cpu", "--gpus", "99", "--no-disk"])]
    assert "--gpus is 99; expected 1 to 16" in str(failed.exception)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_measured_with_links_peers_and_both_sums() -> None:
    found = ranks.probe_ranks("cuda", 2, Effort(sizes=(4096, 2**20), figure_s=0.05))["2"]
    [together] = together_from_json({"2": found}, "probe").values()
    assert together.link_bytes_per_s and together.link_bytes_per_s > 1e9
    assert len(found["peer_copies_gb_per_s"]["together"]) == 2
    for name in ("all_reduce_us", "nccl_all_reduce_us", "all_gather_us", "reduce_scatter_us"):
        assert all(us > 0 for us in found[name].values())
    assert multiprocessing.active_children() == []
