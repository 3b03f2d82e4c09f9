"""The probe on the CPU of the machine that runs the tests."""

from pathlib import Path

import pytest

from hotset.cgroups import memory_limit_bytes
from hotset.cost.hardware import hardware_from_json
from hotset.errors import ConfigError
from hotset.plan import probe as probes


def test_probe_of_the_cpu_gives_a_complete_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "SHARE_S", 0.02)
    monkeypatch.setattr(probes, "DISK_BYTES", 16 * probes.MIB)
    profile = probes.probe("cpu", tmp_path)
    chips = hardware_from_json(profile, "probe")
    assert chips.measured
    assert chips.hbm_bytes <= memory_limit_bytes() * 1.001
    assert chips.disk_bytes_per_s > 0 and chips.kernel_s
    assert list(tmp_path.iterdir()) == []  # the temporary file is gone


def test_probe_of_a_folder_that_cannot_be_written_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="give disk_path a folder"):
        probes.probe("cpu", Path("/proc/nope"))
