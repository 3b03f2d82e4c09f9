"""What a start says its seconds went to."""

import pytest

from hotset.engine import start_times
from hotset.engine.start_times import StartTimes


def test_each_phase_that_took_a_while_has_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 3.0, 3.0, 4.5, 4.5, 4.5, 5.0])
    monkeypatch.setattr(start_times.time, "perf_counter", lambda: next(seconds))
    times = StartTimes()
    with times.phase("load the model") as phase:
        pass
    phase.detail = "1.0 GB, 2.0 GB/s"
    with pytest.raises(ValueError), times.phase("compile"):
        raise ValueError
    with times.phase("open tiers"):
        pass
    total, *lines = times.report().splitlines()
    assert total == "start: 5.0 s"
    assert [line.split() for line in lines] == [
        ["load", "the", "model", "2.0", "s", "1.0", "GB,", "2.0", "GB/s"],
        ["compile", "1.5", "s"],
        ["other", "1.5", "s"],
    ]


def test_a_process_counts_its_imports_first() -> None:
    times = StartTimes.of_process(num_phases=1)
    times.close()
    times.close()
    total, first, *_ = times.report().splitlines()
    assert "Python and imports" in first
    assert float(total.split()[1]) >= float(first.split()[-2]) > 0
