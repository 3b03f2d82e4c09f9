"""A desk and the fronts that pass files and batches on to it and lease limits of keys from it."""

import contextlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from servers import CHAT, KEY, RunningServer, running_server, wait_for

from hotset.fleet.address import Address
from hotset.fleet.leases import Ledger
from hotset.options import Options
from hotset.server.app import ServerConfig
from hotset.server.desk import Desk, DeskEntry
from hotset.server.keys import Keys
from hotset.server.limits import Limits
from hotset.server.response_store import ResponseStore

SECRET = b"a secret of the whole fleet"
BOB = "sk-bob-0123456789"
LINE = {"method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", **CHAT}}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[keys.alice]\nkey = "{KEY}"\n[keys.bob]\nkey = "{BOB}"\nrequests_per_minute = 5\n'
    )
    return path


def read_keys(path: Path) -> Keys:
    keys = Keys()
    keys.read_file(path)
    return keys


@contextlib.contextmanager
def running_desk(tmp_path: Path, keys_file: Path, num_fronts: int = 1) -> Iterator[RunningServer]:
    keys = read_keys(keys_file)
    ledger = Ledger({one.name: one.limits for one in keys.tenants}, num_fronts=num_fronts)
    with running_server(
        Options.of(hot_gib=0.01, max_num_seqs=2),  # so that a batch is written line by line
        server_config=ServerConfig(keys=keys, files_path=tmp_path / "files"),
        entry=lambda api: DeskEntry(api, ledger, ResponseStore.of(Limits()), SECRET),
        listener=Address(path=str(tmp_path / "desk.sock")).listen(),
    ) as desk:
        yield desk


@contextlib.contextmanager
def running_front(
    tmp_path: Path,
    keys_file: Path,
    *,
    rank: int = 0,
    num_fronts: int = 1,
    secret: bytes = SECRET,
) -> Iterator[RunningServer]:
    address = Address(path=str(tmp_path / "desk.sock"))
    desk = Desk(address, secret, rank=rank, num_fronts=num_fronts)
    with running_server(server_config=ServerConfig(keys=read_keys(keys_file), desk=desk)) as front:
        yield front


def chat(front: RunningServer) -> int:
    headers = {"authorization": f"Bearer {BOB}"}
    return httpx.post(
        f"{front.url}/v1/chat/completions", json=CHAT, headers=headers, timeout=60
    ).status_code


def test_a_batch_goes_on_line_by_line_when_the_desk_starts_again(
    tmp_path: Path, keys_file: Path
) -> None:
    lines = [{"custom_id": str(i), **LINE} for i in range(60)]
    content = "\n".join(map(json.dumps, lines)).encode()
    with running_front(tmp_path, keys_file) as front:
        client = front.openai()
        with running_desk(tmp_path, keys_file) as desk:
            source = client.files.create(file=("in.jsonl", content), purpose="batch")
            assert client.files.content(source.id).content == content
            with pytest.raises(openai.NotFoundError):
                front.openai(BOB).files.retrieve(source.id)
            with pytest.raises(openai.AuthenticationError):
                front.openai("sk-nobody-0123456789").files.list()
            batch = client.batches.create(
                input_file_id=source.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
            output = tmp_path / "files" / "alice" / f"{batch.id.replace('batch', 'file')}.data"
            wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= 5)
            desk.stop()
        begun = output.read_bytes()
        assert 5 <= begun.count(b"\n") < 60
        with pytest.raises(openai.InternalServerError, match="the desk of this fleet") as gone:
            client.files.list()
        assert gone.value.status_code == 503 and gone.value.response.headers["retry-after"] == "1"
        assert client.chat.completions.create(model="tiny", **CHAT).choices
        with running_desk(tmp_path, keys_file):
            wait_for(lambda: client.batches.retrieve(batch.id).status == "completed")
            done = client.files.content(f"{batch.id.replace('batch', 'file')}").content
    assert done.startswith(begun)
    records = [json.loads(line) for line in done.splitlines()]
    assert [one["custom_id"] for one in records] == [str(i) for i in range(60)]
    assert (
        len({one["response"]["body"]["choices"][0]["message"]["content"] for one in records}) == 1
    )


def test_a_keys_limit_holds_over_two_fronts_and_goes_on_by_halves_without_a_desk(
    tmp_path: Path, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        desk = stack.enter_context(running_desk(tmp_path, keys_file, num_fronts=2))
        fronts = [
            stack.enter_context(running_front(tmp_path, keys_file, rank=rank, num_fronts=2))
            for rank in range(2)
        ]
        shares = [front.api._config.keys.find(BOB).share for front in fronts]
        wait_for(lambda: all(share.is_leased for share in shares))
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(chat, [fronts[0]] * 4))
        assert answers == [200] * 4  # at once, and more than its half, which is 2.5
        assert [chat(fronts[1]) for _ in range(3)].count(200) <= 2
        desk.stop()
        wait_for(lambda: not any(share.is_leased for share in shares))
        assert "each key has 1/2 of its limits here" in caplog.text
        assert [chat(front) for front in fronts] == [429, 429]  # nothing is left of the minute


def test_a_front_with_another_secret_has_its_part_alone(
    tmp_path: Path, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with (
        running_desk(tmp_path, keys_file, num_fronts=2),
        running_front(tmp_path, keys_file, num_fronts=2, secret=b"another one") as front,
    ):
        wait_for(lambda: "the fleet secret is another one" in caplog.text)
        assert [chat(front) for _ in range(3)] == [200, 200, 429]


def test_the_desk_takes_no_broken_asks(tmp_path: Path, keys_file: Path) -> None:
    from hotset.server.desk import desk_token

    transport = httpx.HTTPTransport(uds=str(tmp_path / "desk.sock"))
    with (
        running_desk(tmp_path, keys_file),
        httpx.Client(transport=transport, base_url="http://localhost") as http,
    ):
        headers = {"authorization": f"Bearer {desk_token(SECRET)}"}
        for content in (
            b"",
            b"[]",
            b'{"rank": "a"}',
            b'{"rank": 1, "num_fronts": 9, "is_leased": 1}',
        ):
            assert http.post("/leases", content=content, headers=headers).status_code == 400
        body = json.dumps({"rank": 0, "num_fronts": 2, "is_leased": True})
        answer = http.post("/leases", content=body, headers=headers)
        assert (answer.status_code, "same number" in answer.text) == (400, True)
        assert http.post("/leases", content=body).status_code == 401


def test_a_response_that_one_front_stores_is_found_by_the_other_and_for_its_key_only(
    tmp_path: Path, keys_file: Path
) -> None:
    with contextlib.ExitStack() as stack:
        desk = stack.enter_context(running_desk(tmp_path, keys_file, num_fronts=2))
        one, other = (
            stack.enter_context(running_front(tmp_path, keys_file, rank=rank, num_fronts=2))
            for rank in range(2)
        )
        ask = {"model": "tiny", "input": "the cat", "max_output_tokens": 4, "store": True}
        first = one.openai().responses.create(**ask)
        assert first.store is True
        assert other.openai().responses.retrieve(first.id) == first
        streamed = [*other.openai().responses.create(**ask, stream=True)][-1].response
        assert streamed.store is True
        second = one.openai().responses.create(**ask, previous_response_id=streamed.id)
        assert second.previous_response_id == streamed.id
        with pytest.raises(openai.NotFoundError, match="store is true"):
            other.openai(BOB).responses.retrieve(first.id)
        other.openai().responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match="store is true"):
            one.openai().responses.retrieve(first.id)
        desk.stop()
        with pytest.raises(openai.InternalServerError, match="the desk of this fleet"):
            one.openai().responses.retrieve(second.id)
        assert one.openai().responses.create(**ask).store is False
