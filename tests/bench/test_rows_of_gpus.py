"""The rows of benchmarks/many_gpus.py: predicted before they run, or left out with a reason."""

import pytest
from many_gpus import is_left_out, line, predicted_row, summary
from many_gpus_rows import Size, jobs

from hotset.cost.hardware import load_hardware

H200 = load_hardware("h200")


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_each_row_has_a_prediction_or_is_left_out_with_its_reason(gpus: int) -> None:
    for job in jobs(Size.full(), gpus):
        for row in job.rows:
            entry = predicted_row(job, row, H200)
            assert entry["predicted_s"] or is_left_out(entry)
            assert entry["gpus"] == gpus and line(entry).startswith(f"{gpus} GPUs (")


def test_experts_over_two_links_are_expected_1_9_times_as_fast() -> None:
    def predicted(gpus: int) -> list[float]:
        [job] = [job for job in jobs(Size.full(), gpus) if job.name == "experts-bf16"]
        return [predicted_row(job, row, H200)["predicted_s"] for row in job.rows]

    assert all(1.9 <= one / two < 2 for one, two in zip(predicted(1), predicted(2), strict=True))


def test_the_summary_has_signed_errors_and_times_of_one_gpu() -> None:
    rows = [
        {"row": "a", "gpus": 1, "predicted_s": 2.0, "measured_s": 2.2},
        {"row": "a", "gpus": 2, "predicted_s": 1.0, "measured_s": 1.1},
        {"row": "b", "gpus": 2, "predicted_s": 1.0, "measured_s": 0.8},
        {"row": "c", "gpus": 2, "predicted_s": 1.0, "measured_s": None, "error": "rank 1: ..."},
    ]
    found = summary(rows)
    assert found["rows"] == 3 and found["times_one_gpu"] == {"a": {"2": pytest.approx(2.0)}}
    assert found["mean_absolute_error"] == pytest.approx(0.4 / 3)
    assert found["mean_signed_error"] == pytest.approx(0.0)
    assert found["largest_error"] == pytest.approx(-0.2)
