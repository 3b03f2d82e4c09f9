"""The client that loads a server over HTTP: what it sees, against a server that answers at once."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from servers import running_server

from hotset.bench.against import Server, run_against
from hotset.bench.events import ids_of, read_answer
from hotset.bench.http_stream import Endpoint, RawAnswer
from hotset.bench.load import LoadProcesses, num_processes
from hotset.bench.load_player import Asking
from hotset.bench.workload import Session, Spec, Turn, Work, make_work
from hotset.errors import ConfigError, EngineError
from hotset.options import Options

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(SCRIPTS))
from instant_server import (  # noqa: E402
    BREAKS_OFF,
    CLOSES,
    FAILS,
    REFUSED,
    TELLS_NO_USAGE,
    answer_ids,
)


@contextlib.contextmanager
def instant(*options: str) -> Iterator[str]:
    """The address of such a server."""
    command = [sys.executable, str(SCRIPTS / "instant_server.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with instant("--step-ms", "2") as found:
        yield found


@pytest.fixture(scope="module")
def load() -> Iterator[LoadProcesses]:
    load = LoadProcesses(2)
    yield load
    load.close()


def server_at(url: str) -> Server:
    server = Server(url, model=None, key=None, vocab_size=32_000)
    server.find_out([7, 8])
    return server


def turn(prompt: list[int], output_tokens: int, extends: bool = False) -> Turn:
    return Turn(partial(list, prompt), len(prompt), output_tokens, extends)


def work_of(*sessions: Session) -> Work:
    return Work("made", sessions, 1)


def test_every_token_is_counted_with_its_id_and_its_time(url: str, load: LoadProcesses) -> None:
    work = make_work(Spec("unshared", users=9, first_tokens=40, output_tokens=30), 32_000)
    server = server_at(url)
    assert server.gives_ids
    seen: list[int] = []
    played = load.play(
        server.asking, work, progress=lambda play, now_s: seen.append(play.num_ended)
    )
    play = played.play
    assert played.is_complete and played.num_processes == 2
    assert (play.num_ended, play.num_failed, play.output_tokens) == (9, 0, 270)
    assert play.prompt_tokens == 9 * 40 and len(play.gaps_s) == 9 * 29
    assert sorted(record.session for record in play.records) == list(range(9))
    for record in play.records:
        prompt = work.sessions[record.session].turns[0].make_tokens()
        assert record.token_ids.tolist() == answer_ids(prompt, 30)
        assert record.first_s is not None and record.end_s is not None
        # 30 steps, of 2 ms at least.
        assert 0 < record.first_s < record.last_s - 0.05 < record.end_s <= played.wall_s
    assert all(gap >= 0 for gap in play.gaps_s)
    assert max(play.gaps_s) < played.wall_s
    assert 0 <= played.busiest < 1


def test_later_turns_send_the_answers_back(url: str, load: LoadProcesses) -> None:
    sessions = [
        Session(tuple(turn([10 * user + number, 5], 4, number > 0) for number in range(3)))
        for user in range(1, 6)
    ]
    work = work_of(*sessions)
    played = load.play(server_at(url).asking, work)
    assert played.is_complete and len(played.play.records) == 15
    records = {(r.session, r.turn): r for r in played.play.records}
    for index, session in enumerate(sessions):
        context: list[int] = []
        for number, one in enumerate(session.turns):
            context += one.make_tokens()
            expected = answer_ids(context, 4)
            record = records[index, number]
            assert record.token_ids.tolist() == expected
            assert record.prompt_tokens == len(context)
            if number:  # due as the one before ended
                assert record.sent_s == records[index, number - 1].end_s
            context += expected


def test_without_ids_later_turns_send_stand_ins_which_are_the_same_each_time(
    load: LoadProcesses,
) -> None:
    sessions = [Session((turn([user + 50], 6), turn([9], 6, True))) for user in range(3)]
    with instant("--no-ids") as url:
        server = server_at(url)
        assert not server.gives_ids
        runs = [load.play(server.asking, work_of(*sessions)) for _ in range(2)]
    answers = [
        {(r.session, r.turn): r.token_ids.tolist() for r in run.play.records} for run in runs
    ]
    assert answers[0] == answers[1]
    assert all(len(ids) == 6 for ids in answers[0].values())
    assert len(set(map(tuple, answers[0].values()))) == 6
    assert runs[0].play.output_tokens == 36


def test_what_goes_wrong_is_told_of_the_request_and_ends_its_session_alone(
    url: str, load: LoadProcesses
) -> None:
    firsts = [BREAKS_OFF, REFUSED, FAILS, TELLS_NO_USAGE, CLOSES, 77]
    work = work_of(*(Session((turn([first, 9], 8), turn([first], 8))) for first in firsts))
    played = load.play(server_at(url).asking, work)
    errors = {firsts[r.session]: r.error for r in played.play.records if r.error is not None}
    assert errors.keys() == {BREAKS_OFF, REFUSED, FAILS}
    assert errors[BREAKS_OFF].startswith("the server closed the connection after ")
    assert errors[REFUSED] == 'HTTP 400: {"error": {"message": "the prompt is\\ntoo long"}}'
    assert errors[FAILS] == "the engine has failed"
    assert (played.play.num_ended, played.play.num_failed) == (9, 3)
    assert played.play.output_tokens == 6 * 8
    ended_well = [r for r in played.play.records if r.error is None]
    assert {(firsts[r.session], r.turn) for r in ended_well} == {
        (first, number) for first in (TELLS_NO_USAGE, CLOSES, 77) for number in (0, 1)
    }
    assert all(r.num_tokens == len(r.token_ids) == 8 for r in ended_well)


def test_sessions_arrive_at_their_times(url: str, load: LoadProcesses) -> None:
    arrivals = [0.0, 0.1, 0.1, 0.25, 0.3]
    sessions = [Session((turn([60 + i], 2),), at) for i, at in enumerate(arrivals)]
    played = load.play(server_at(url).asking, work_of(*sessions))
    for record in played.play.records:
        assert record.sent_s == arrivals[record.session]
        assert record.first_s is not None and record.first_s >= record.sent_s
    assert played.wall_s >= 0.3


def test_a_run_ends_at_its_time_limit_with_what_it_has(load: LoadProcesses) -> None:
    sessions = [Session((turn([60], 2),)), Session((turn([61], 10_000),))]
    with instant("--step-ms", "5") as url:
        begin_s = time.perf_counter()
        played = load.play(server_at(url).asking, work_of(*sessions), max_s=0.3)
        assert time.perf_counter() - begin_s < 20
    assert not played.is_complete
    assert {r.session: r.error for r in played.play.records} == {0: None, 1: "broken off"}


def test_a_server_that_is_gone_is_an_error_of_each_request(load: LoadProcesses) -> None:
    with instant() as url:
        server = server_at(url)
    played = load.play(server.asking, work_of(*(Session((turn([60], 2),)) for _ in range(3))))
    assert [
        r.error is not None and "cannot be reached" in r.error for r in played.play.records
    ] == [True] * 3
    with pytest.raises(ConfigError, match="cannot be reached"):
        server_at(url)


def test_a_process_that_is_gone_ends_the_run(url: str) -> None:
    load = LoadProcesses(1)
    load._processes[0].kill()
    load._processes[0].join()
    with pytest.raises(EngineError, match="a process of the client has ended"):
        load.play(server_at(url).asking, work_of(Session((turn([60], 2),))))
    load.close()


def test_the_clock_starts_when_the_host_tier_is_ready() -> None:
    tiers = [{"name": "host", "capacity": n, "planned": 30} for n in (0, 10, 20, 30)]
    spec = Spec("unshared", users=2, first_tokens=8, output_tokens=2)
    with instant("--host-tiers", json.dumps(tiers)) as url:
        server = server_at(url)
        waited_s = server.wait_for_host_tier()
        assert waited_s is not None and waited_s >= 0.75  # three looks that showed less
        work = make_work(spec, 32_000)
        run = run_against(
            server, spec, work, arm="a", repeat=0, max_s=None, progress=lambda *_: None
        )
        assert run.is_complete and run.output_tokens == 4
        # On a busy machine there may be another, of a busy client or a slow look.
        [note] = [note for note in run.notes if "sent from" in note]
        assert note.startswith("a: sent from 1 processes, of which the busiest took ")
    with instant() as url:
        assert server_at(url).wait_for_host_tier() is None


def test_a_server_of_ours_tells_ids_and_how_much_of_its_host_tier_is_ready() -> None:
    with running_server(Options.of(hot_gib=0.01, host_gib=0.01)) as running:
        server = Server(running.url, model=None, key=None, vocab_size=512)
        server.find_out([5, 6, 7])
        assert server.gives_ids
        assert server.wait_for_host_tier() is not None
        ready = server._host_tier()
        assert ready is not None and ready[0] == ready[1] > 0
        with running.http() as http:
            body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
            asked = {**body, "return_token_ids": True}
            whole = http.post("/v1/completions", json=asked).json()["choices"][0]
            assert len(whole["token_ids"]) == 6
            plain = http.post("/v1/completions", json=body).json()["choices"][0]
            assert "token_ids" not in plain and plain["text"] == whole["text"]
            streamed = http.post("/v1/completions", json={**asked, "stream": True}).content
            assert ids_of(streamed) == whole["token_ids"]


def test_one_process_is_taken_for_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, sessions, expected in ((1, 9, 1), (2, 9, 1), (16, 256, 8), (64, 256, 8), (16, 3, 3)):
        monkeypatch.setattr("hotset.bench.load.usable_cpus", lambda n=cores: n)
        assert num_processes(sessions) == expected


def raw(*chunks: str, status: int = 200) -> RawAnswer:
    return RawAnswer(status, [(float(i), chunk.encode()) for i, chunk in enumerate(chunks)])


def test_an_event_has_the_time_at_which_its_end_came() -> None:
    one = 'data: {"choices": [{"text": "a", "token_ids": [1, 2]}]}\r\n\r\n'
    two = 'data:{"choices": [{"text": "\\"token_ids\\": [9]", "finish_reason": "stop"}]}\n\n'
    for cut in range(1, len(one) - 3):
        reading = read_answer(raw(one[:cut], one[cut:] + two, ": a comment\n\n"))
        assert reading.outputs == [(1.0, (1, 2)), (1.0, ())]
        assert reading.error is None and reading.num_tokens is None
    assert ids_of((one + two).encode()) == [1, 2]


@pytest.mark.parametrize(
    ("chunk", "says"),
    [
        ("data: {", "an event cannot be read"),
        ("data: [1]\n\n", "an event cannot be read"),
        ('data: {"choices": [3]}\n\n', "an event cannot be read"),
        ('data: {"usage": {"completion_tokens": "many"}}\n\n', "an event cannot be read"),
        ('data: {"choices": [{"text": "a"}]}\n\n', "the stream ended without its last event"),
        ("", "the stream ended without its last event"),
        ('data: {"error": "no\\nmemory"}\n\n', "no memory"),
    ],
)
def test_an_answer_that_is_no_stream_of_events_is_an_error(chunk: str, says: str) -> None:
    error = read_answer(raw(chunk)).error
    assert error is not None and error.startswith(says)


def test_urls_and_keys_are_checked() -> None:
    endpoint = Endpoint.of("https://[::1]/x/v1/completions", "sk-1")
    assert (endpoint.host, endpoint.port, endpoint.is_tls) == ("::1", 443, True)
    assert b"POST /x/v1/completions HTTP/1.1\r\nHost: [::1]\r\n" in endpoint.headers
    assert b"\r\nAuthorization: Bearer sk-1" in endpoint.headers
    for url, key in (("http://", None), ("http://a:b/", None), ("http://a/", "k\r\nX: y")):
        with pytest.raises(ConfigError):
            Endpoint.of(url, key)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_servers_with_tls_are_loaded_and_their_certificates_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem, key = tmp_path / "server.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(pem)]
    subprocess.run([*command.split(), *subject, *files], check=True, capture_output=True)
    pem.write_text(pem.read_text() + key.read_text())
    work = work_of(Session((turn([60], 5), turn([61], 5))))
    with instant("--certificate", str(pem)) as url:
        endpoint = Endpoint.of(url.replace("http:", "https:") + "/v1/completions", "sk-1")
        asking = Asking(endpoint, "instant", True, (1000, 2000))
        errors = []
        for is_trusted in (True, False):
            if is_trusted:
                monkeypatch.setenv("SSL_CERT_FILE", str(pem))
            else:
                monkeypatch.delenv("SSL_CERT_FILE")
            load = LoadProcesses(1)
            played = load.play(asking, work)
            load.close()
            errors.append([record.error for record in played.play.records])
    assert errors[0] == [None, None]
    [error] = errors[1]
    assert error is not None and "CERTIFICATE_VERIFY_FAILED" in error
