from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hotset.errors import ConfigError
from hotset.secret import own_secret, read_secret


def test_processes_that_start_at_once_share_the_secret_that_one_of_them_makes(
    tmp_path: Path,
) -> None:
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(own_secret, [tmp_path] * 32))
    [secret] = secrets
    assert len(secret) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"0123456789abcdef", 0o640, "can be read by other users; run: chmod 600"),
        (b"short\n", 0o600, "has 5 bytes; expected 16 to 4096"),
        (b"x" * 5000, 0o600, "expected 16 to 4096"),
    ],
)
def test_a_secret_that_is_none_is_refused(
    tmp_path: Path, content: bytes, mode: int, said: str
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=said):
        read_secret(path)


def test_white_space_around_a_secret_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_bytes(b"  0123456789abcdef\r\n")
    assert read_secret(path) == b"0123456789abcdef"


def test_a_secret_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_secret(tmp_path / "none")
