"""What each rank has of memory and link: told, shown, and bounded for all of them together."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import engines
import pytest
from rich.console import Console

from hotset.cli.top_view import _ranks
from hotset.engine.engine import Engine
from hotset.engine.status import engine_status
from hotset.metrics import RankMemory
from hotset.parallel import group
from hotset.ranks.memory import RanksMemory, ranks_table
from hotset.ranks.messages import Held
from hotset.server.engine_metrics import EngineFamilies, EngineFigures

MIB = 2**20
STARVED = {"hot_blocks": 26, "host_blocks": 300, "disk_mib": 8, "fetch_policy": "fetch"}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def samples(engine: Engine, name: str) -> dict[str, float]:
    figures = EngineFigures((), engine.metrics, engine_status(engine, num_queued=0))
    [family] = (one for one in EngineFamilies([figures]).collect() if one.name == name)
    return {one.labels["rank"]: one.value for one in family.samples}


def test_each_rank_is_told_and_all_together_stay_within_what_was_given(
    make_ranked: Any, tmp_path: Path
) -> None:
    engine = make_ranked("llama", disk_path=tmp_path, **STARVED)
    for _ in range(2):
        engines.run(engine, engines.make_prompts())
    engine.take_counts()
    memory = engine.options.memory
    first, second = ranks = engine_status(engine, num_queued=0).ranks
    assert first.device == second.device == "cpu" and first.host == second.host
    assert 0 < first.used_bytes < first.total_bytes == second.total_bytes
    assert 0 < sum(one.host_bytes for one in ranks) <= memory.host_gib * 2**30
    assert 0 < used(tmp_path) <= sum(one.disk_bytes for one in ranks) <= memory.disk_gib * 2**30
    assert all(one.link_bytes_per_s > 0 for one in ranks)
    assert "of each of 2 ranks\nrank" in engine.report and "\nall " in engine.report
    assert samples(engine, "hotset:rank_host_bytes") == {
        "0": first.host_bytes,
        "1": second.host_bytes,
    }


def test_experts_in_host_memory_are_counted_once_over_all_ranks(make_ranked: Any) -> None:
    engine = make_ranked("qwen3_moe", expert_slots=2)
    experts = engine.sizes.experts
    host_bytes = [one.host_bytes for one in engine.memory()]
    assert host_bytes == [experts.host_bytes] * 2 and experts.host_bytes > 0


def test_one_rank_has_the_rate_of_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_current", group._ONE)
    engine = engines.make_engine("llama", **{**STARVED, "disk_mib": 0})
    for _ in range(2):
        engines.run(engine, engines.make_prompts())
    [one] = engine_status(engine, num_queued=0).ranks
    assert one.link_bytes_per_s == engine.rates.link_bytes_per_s["host"]
    engine.close()


def test_ranks_are_shown_in_the_terminal_and_at_start() -> None:
    class Own:
        def read(self) -> RankMemory:
            return RankMemory("a", "cuda:0 NVIDIA H200", 30 * 2**30, 140 * 2**30, 2**30, 0)

    memory = RanksMemory(Own())  # type: ignore[arg-type]
    memory.take(1, Held(RankMemory("b", "cuda:0 NVIDIA H200", 2**30, 140 * 2**30, 2**30, 4 * MIB)))
    memory.note_copy(0, 10**9, 0.02)
    memory.note_copy(0, 10**9, 0.01)
    first, second = memory.read()
    assert (first.link_bytes_per_s, second.link_bytes_per_s) == (60e9, 0.0)
    lines = ranks_table([first, second]).splitlines()
    assert lines[1].split() == [
        *("0", "cuda:0", "NVIDIA", "H200", "on", "a", "30", "GiB", "140", "GiB", "1", "GiB"),
        *("0", "B"),
    ]
    assert lines[3].split() == ["all", "2", "GiB", "4", "MiB"]
    console = Console(width=120, file=io.StringIO())
    console.print(_ranks([asdict(first), asdict(second)]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "cuda:0 NVIDIA H200 on a" in shown and "32.2 GB of 150.3 GB" in shown
    assert "60.0 GB/s" in shown
