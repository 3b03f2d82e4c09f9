import os
import socket
from pathlib import Path

import pytest

from hotset.errors import ConfigError
from hotset.fleet.address import Address, bound


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:7000", Address(host="127.0.0.1", port=7000)),
        ("[::1]:7000", Address(host="::1", port=7000)),
        ("gpu-7.example:0", Address(host="gpu-7.example", port=0)),
        ("/run/hotset/r1.sock", Address(path="/run/hotset/r1.sock")),
    ],
)
def test_an_address_is_read_and_written(text: str, expected: Address) -> None:
    assert Address.of(text) == expected
    assert str(expected) == text


def test_a_path_is_that_of_a_file_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Address.of("./r1.sock") == Address(path=str(tmp_path / "r1.sock"))


@pytest.mark.parametrize(
    "text", ["", "here", ":7000", "host:", "host:x", "host:65536", "host:-1", "host:\u0661", "[]:1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        Address.of(text)


def test_a_socket_of_a_process_that_has_ended_is_replaced_and_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    address = Address(path=str(tmp_path / "s"))
    with address.listen() as first:
        assert os.stat(address.path).st_mode & 0o777 == 0o600
        with pytest.raises(ConfigError, match=r"cannot listen at .*/s: Address already in use"):
            address.listen()
        assert bound(first) == address
    with address.listen(), socket.socket(socket.AF_UNIX) as client:
        client.connect(address.path)


def test_a_file_in_place_of_a_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="cannot listen"):
        Address(path=str(path)).listen()
    assert path.read_text() == "mine"


def test_others_connect_to_a_name_and_not_to_all_addresses() -> None:
    name = socket.gethostname()
    assert Address.of("0.0.0.0:7000").for_others() == Address(host=name, port=7000)
    assert Address.of("[::]:7000").for_others() == Address(host=name, port=7000)
    for text in ("127.0.0.1:7000", "/run/r1.sock"):
        assert Address.of(text).for_others() == Address.of(text)


def test_a_port_of_0_is_any_free_one() -> None:
    with Address.of("127.0.0.1:0").listen() as listener:
        assert bound(listener).port > 0
        with pytest.raises(ConfigError, match="choose another address"):
            bound(listener).listen()
