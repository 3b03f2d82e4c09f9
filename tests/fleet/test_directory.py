import contextlib
import logging
import os
import time
from pathlib import Path

import msgspec
import pytest

from hotset.errors import ConfigError
from hotset.fleet import directory
from hotset.fleet.directory import Directory, Entry, Registration, make_private


def entry(replica_id: str = "r1", pid: int = 1) -> Entry:
    return Entry(replica_id, "/run/r1.sock", pid, "tiny", "f" * 32, "n" * 16, (1,))


def test_a_replica_is_found_while_its_entry_is_kept(tmp_path: Path) -> None:
    found = Directory(tmp_path)
    assert found.entries() == ()
    with contextlib.closing(Registration(tmp_path, entry("b"))) as kept:
        with contextlib.closing(Registration(tmp_path, entry("a"))):
            assert [one.replica_id for one in found.entries()] == ["a", "b"]
        kept.set_load({"queued_tokens": 7})
        kept.set_draining()
        [one] = found.entries()
        assert one.is_draining
        assert one.load == {"queued_tokens": 7}
    assert found.entries() == ()
    assert not list(tmp_path.iterdir())


def test_an_entry_is_written_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_WRITE_EVERY_S", 0.01)
    path = tmp_path / "r1.json"
    with contextlib.closing(Registration(tmp_path, entry())):
        os.utime(path, (0, 0))
        while not Directory(tmp_path).entries():
            time.sleep(0.01)


def test_an_entry_that_nobody_writes_any_more_is_of_a_replica_that_has_ended(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r1.json"
    path.write_bytes(msgspec.json.encode(entry()))
    socket = tmp_path / "r1.sock"
    socket.touch()
    os.utime(socket, (time.time() - 70, time.time() - 70))  # a replica listens first
    os.utime(path, (time.time() - 11, time.time() - 11))
    assert Directory(tmp_path).entries() == ()
    assert path.exists()  # it may be written again
    os.utime(path, (time.time() - 61, time.time() - 61))
    Registration(tmp_path, entry("r2")).close()
    assert not path.exists() and not socket.exists()


def test_the_socket_of_a_successor_that_loads_for_long_is_not_swept_away(tmp_path: Path) -> None:
    now_s = time.time()
    for name, entry_age_s, socket_age_s in (("killed", 90, 95), ("again", 90, 80)):
        for suffix, age_s in ((".json", entry_age_s), (".sock", socket_age_s)):
            (tmp_path / f"{name}{suffix}").write_bytes(b"{}")
            os.utime(tmp_path / f"{name}{suffix}", (now_s - age_s, now_s - age_s))
    Registration(tmp_path, entry("other")).close()
    assert [path.name for path in tmp_path.iterdir()] == ["again.sock"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 60000, b"\xff\x00", b'{"replica_id": "r9"}', msgspec.json.encode(entry())],
)
def test_what_is_no_entry_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r9.json").write_bytes(content)
    with contextlib.closing(Registration(tmp_path, entry())):
        assert [one.replica_id for one in Directory(tmp_path).entries()] == ["r1"]


def test_the_last_list_stands_while_the_folder_is_out_of_reach(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, away = tmp_path / "fleet", tmp_path / "away"
    folder.mkdir()
    found = Directory(folder)
    with contextlib.closing(Registration(folder, entry())), caplog.at_level(logging.WARNING):
        known = found.entries()
        assert len(known) == 1
        folder.rename(away)
        assert found.entries() == known
        assert found.entries() == known
        assert len(caplog.records) == 1
        away.rename(folder)
        assert found.entries() == known


def test_an_id_that_a_living_replica_has_is_refused(tmp_path: Path) -> None:
    with (
        contextlib.closing(Registration(tmp_path, entry(pid=1))),
        pytest.raises(ConfigError, match="replica id r1 is in use by process 1"),
    ):
        Registration(tmp_path, entry(pid=2))


def test_a_folder_that_others_can_change_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "fleet"
    make_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    make_private(folder)
    folder.chmod(0o770)
    with pytest.raises(ConfigError, match="can be changed by other users"):
        make_private(folder)
