"""What a start says its seconds went to."""

import re

import pytest

from hotset.engine.start_times import StartTimes


def test_each_phase_has_a_line_and_the_rest_another() -> None:
    times = StartTimes()
    with times.phase("load the model") as phase:
        pass
    phase.detail = "1.0 GB, 2.0 GB/s"
    with pytest.raises(ValueError), times.phase("compile"):
        raise ValueError
    total, *lines = times.report().splitlines()
    assert re.fullmatch(r"start: \d+\.\d s", total)
    assert [line.split("  ")[1] for line in lines] == ["load the model", "compile", "other"]
    assert lines[0].endswith(" s  1.0 GB, 2.0 GB/s")


def test_a_process_counts_its_imports_first() -> None:
    times = StartTimes.of_process(num_phases=1)
    times.close()
    times.close()
    total, first, *_ = times.report().splitlines()
    assert "Python and imports" in first
    assert float(total.split()[1]) >= float(first.split()[-2]) > 0
