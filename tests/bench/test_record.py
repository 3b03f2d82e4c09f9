"""What benchmark scripts write."""

import json
import re
from pathlib import Path

import pytest
import record

BENCHMARKS = Path(record.__file__).parent


def test_a_record_says_what_made_it_and_its_page_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks/some.py", "--users", "2 3"])
    found = record.start(seed=7, rows=[1])
    record.write(tmp_path / "new" / "some", found, f"# Some\n\n{record.footer(found)}")
    read = json.loads((tmp_path / "new" / "some.json").read_text("utf-8"))
    assert read == found
    assert read["command"] == "python benchmarks/some.py --users '2 3'"
    assert {"cpu", "versions", "gpus"} <= read["machine"].keys() and "commit" in read
    page = (tmp_path / "new" / "some.md").read_text("utf-8")
    assert "`python benchmarks/some.py --users '2 3'`, seed 7, commit" in page
    record.write(None, found)  # no file was asked for


def test_a_label_is_added_and_the_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    record.add(out, "before", {"a": 1})
    record.add(out, "after", {"a": 2})
    record.add(out, "before", {"a": 3})
    assert json.loads(out.read_text("utf-8")) == {"before": {"a": 3}, "after": {"a": 2}}


def test_percentiles_are_scaled_and_named() -> None:
    values = [i / 1000 for i in range(101)]
    assert record.percentiles(values, scale=1e3) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert record.percentiles([2.0], of=[10], digits=1) == {"p10": 2.0}


def test_a_table_has_a_column_for_each_field_and_short_figures() -> None:
    rows = [{"case": "one", "rate": 41.26, "bytes": 1152}, {"case": "two", "rate": 1234.5, "us": 3}]
    assert record.table(rows).splitlines() == [
        "| case | rate | bytes | us |",
        "| --- | --- | --- | --- |",
        "| one | 41.3 | 1,152 |  |",
        "| two | 1,234 |  | 3 |",
    ]


def test_each_script_has_a_line_in_the_readme() -> None:
    told = set(re.findall(r"`([\w/]+\.py)`", (BENCHMARKS / "README.md").read_text("utf-8")))
    there = {str(path.relative_to(BENCHMARKS)) for path in BENCHMARKS.rglob("*.py")}
    assert told == there
