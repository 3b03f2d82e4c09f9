from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.engine.messages import EngineInfo, Load, Queued, Report, Submit
from hotset.engine.status import EngineStatus, StateStatus, TierStatus
from hotset.errors import (
    ConfigError,
    DrainingError,
    EngineError,
    HotsetError,
    OverloadedError,
    RequestError,
)
from hotset.fleet import wire
from hotset.memory.journal import JournalPart
from hotset.metrics import Metrics
from hotset.options import Options
from hotset.request import (
    FinishReason,
    RequestOutput,
    Resumed,
    SamplingParams,
    TextForm,
    TokenLogprob,
)

TOKENS = st.integers(0, 2**20)
LOGPROBS = st.builds(
    lambda *values: TokenLogprob(*values),
    TOKENS,
    st.floats(-100, 0),
    st.lists(st.tuples(TOKENS, st.floats(-100, 0)), max_size=2).map(tuple),
    st.integers(0, 999),
    st.none() | st.integers(1, 99),
)
OUTPUTS = st.builds(
    lambda *values, logprobs: RequestOutput(*values, logprobs=logprobs),
    st.text(max_size=5),
    st.integers(0, 127),
    st.text(max_size=5),
    st.lists(TOKENS, max_size=3).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    logprobs=st.lists(LOGPROBS, max_size=2).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(OUTPUTS, max_size=4), st.lists(st.text(max_size=4), max_size=2))
def test_outputs_come_as_they_were_sent(outputs: list[RequestOutput], started: list[str]) -> None:
    [got] = wire.read_batch(wire.encode(wire.Batch([Report(1.5, outputs, started)]))).reports
    assert (got.outputs, got.started) == (outputs, started)


def test_all_that_a_report_may_have_comes_as_it_was_sent() -> None:
    status = EngineStatus(
        1, 2, 3, 4, 5, "mw", (TierStatus("device", 9, 3, 64, "fc", 9),), {"host": 1e9}, 5e4,
        StateStatus(1, 2, 3, 4, {"host": 5}),
    )  # fmt: skip
    queue = [Queued(0, 0, 0), Queued(2, 3, 4)]
    load = Load(1, -2, 3, 4, 5, 0.5, 6e4, {"host": 2.0}, 7, 0.25, 8, queue, 2e-5, 1e-9)
    journal = JournalPart(3, b"x" * 17, b"", True, True)
    report = Report(
        1.5,
        looks=[(1, status), (2, "no")],
        failure="gone",
        is_draining=True,
        journal=journal,
        load=load,
        started=["a"],
        taken=["b"],
        notes=["c"],
    )
    metrics = Metrics(steps=3)
    metrics.moved_bytes["device>host"] = 2**40
    batch = wire.read_batch(wire.encode(wire.Batch([report], metrics=metrics)))
    [got] = batch.reports
    assert msgspec.json.encode(got) == msgspec.json.encode(report)
    assert got.looks[0][1] == status and got.journal == journal and got.load == load
    assert batch.metrics == metrics
    assert batch.metrics.moved_bytes["none"] == 0  # a Counter


def test_a_submit_comes_as_it_was_sent() -> None:
    params = SamplingParams(
        logit_bias={7: -1.5}, stop=("a", "b"), stop_token_ids=(1,), n=3, text_form=None, seed=2**63
    )
    form = SamplingParams(text_form=TextForm("regex", "a+"), max_tokens=None)
    schema = SamplingParams(json_schema={"type": "object", "properties": {"é": {"enum": [None]}}})
    large = SamplingParams(seed=2**99, json_schema={"maximum": 10**30}, logit_bias={3: 0.1 + 0.2})
    for one in (params, form, schema, large):
        submit = Submit(
            "a#1", range(5), one, b"\x00\xff", 2, "alice", 1.5, 7, [2], [Resumed(1, [3])]
        )
        got = wire.read_submit(
            msgspec.msgpack.decode(wire.encode(wire.submitted(1, submit)), type=wire.Submitted)
        )
        assert (got.params, list(got.token_ids)) == (one, [0, 1, 2, 3, 4])
        assert (got.salt, got.tenant, got.resumed) == (b"\x00\xff", "alice", [Resumed(1, [3])])


@pytest.mark.parametrize(
    "error",
    [
        RequestError("a", param="n", code="x"),
        OverloadedError("b", 7),
        EngineError("c"),
        DrainingError("d"),
        ConfigError("e"),
    ],
)
def test_an_error_comes_as_it_was_raised(error: HotsetError) -> None:
    answer = wire.Answer(1, wire.refusal_of(error))
    [got] = wire.read_batch(wire.encode(wire.Batch(answers=[answer]))).answers
    assert got.refusal is not None
    made = wire.error_of(got.refusal)
    assert type(made) is type(error) and str(made) == str(error)
    assert vars(made) == vars(error)


def test_a_bug_is_an_engine_error_of_one_line_that_can_be_sent() -> None:
    refusal = wire.refusal_of(ValueError("one\ntwo \ud800"))
    assert refusal == wire.Refusal("EngineError", "the request could not be queued: one two ?")


@pytest.mark.parametrize(
    "given_options",
    [
        {},
        {"hot_gib": 1.5, "disk_gib": 2.0, "disk_path": "/x"},
        {"expert_slots": 4, "expert_disk_path": "/y", "expert_host_gib": 1.0},
        {"total_gib": 4.0, "move_split": True},
    ],
)
def test_a_description_of_an_engine_comes_as_it_was_sent(given_options: dict[str, object]) -> None:
    info = EngineInfo(Options.of(**given_options), 512, "report", True, "f", 16, 64, "H200")
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(wire.info_data(info)))
    assert wire.read_info(sent) == info
    newer = {**sent, "something": 1, "options": {**sent["options"], "something": 2}}
    assert wire.read_info(newer) == info
    del sent["numerics"]  # of a replica that does not tell
    assert wire.read_info(sent) == replace(info, numerics="")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": None}, "options are missing"),
        ({"options": {"hot_gib": "much"}}, "hot_gib is 'much'"),
        ({"max_model_len": "x"}, "Expected `int`, got `str`"),
    ],
)
def test_a_description_that_is_none_is_one_line(change: dict[str, object], said: str) -> None:
    data = wire.info_data(EngineInfo(Options.of(), 512, "report", True, "f", 16, 64))
    with pytest.raises(wire.WireError, match=said):
        wire.read_info({**data, **change})


def test_the_newest_version_that_both_speak_is_spoken() -> None:
    assert wire.agree((3, 2), [2, 1]) == 2
    assert wire.agree((3, 2), [4, 3, 2]) == 3
    assert wire.agree((3, 2), [1]) is None


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_bytes_that_are_no_message_are_told_so(data: bytes) -> None:
    for read in (wire.read_hello, wire.read_greeting, wire.read_front_message, wire.read_batch):
        try:
            read(data)
        except wire.WireError as error:
            assert "\n" not in str(error)


def test_nesting_without_end_is_no_message() -> None:
    for data in (b"\x91" * 100_000, b"\x81\xa1a" * 100_000):
        with pytest.raises(wire.WireError):
            wire.read_batch(data)
