"""Fronts that share a port know of each other."""

import os
import time
from pathlib import Path

from hotset.fleet.front_pages import FrontPages


def test_a_front_reads_the_pages_of_the_others_while_they_live(tmp_path: Path) -> None:
    first, second, third = (FrontPages(tmp_path / "fronts", name) for name in "abc")
    assert first.others() == []
    for number, pages in enumerate((first, second, third)):
        pages.write({"number": number})
    assert first.others() == [{"number": 1}, {"number": 2}]
    second.write({"number": 5})
    assert first.others()[0] == {"number": 5}
    third.close()
    third.close()
    assert first.others() == [{"number": 5}]
    (tmp_path / "fronts/b.json").write_bytes(b'{"numb')
    assert first.others() == []
    second.write({"number": 6})
    killed_s = time.time() - 60
    os.utime(tmp_path / "fronts/b.json", (killed_s, killed_s))
    assert first.others() == []
    assert (tmp_path / "fronts").stat().st_mode & 0o077 == 0
