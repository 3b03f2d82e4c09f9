"""What the bench sends: shapes, seeds, arrivals and traces. Needs no torch."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from hotset.bench.play import Play
from hotset.bench.presets import DEFAULTS, PRESETS
from hotset.bench.trace import read_trace
from hotset.bench.workload import TEXTS, Spec, Work, filler, make_work, prefix_work, token_range
from hotset.errors import ConfigError

VOCAB = 128_256


def prompts_of(work: Work) -> list[list[list[int]]]:
    return [[turn.make_tokens() for turn in session.turns] for session in work.sessions]


def sent_tokens(work: Work) -> int:
    """Every prompt token in full, and all answers."""
    return sum(
        sum(session.prompt_lengths()) + sum(turn.output_tokens for turn in session.turns)
        for session in work.sessions
    )


@pytest.mark.parametrize(
    ("name", "sent", "distinct"),
    [
        ("A512", 256 * 768, 256 * 768),
        ("B", 256 * 4608, 256 * 4608),
        ("C3", 1_277_952, 256 * 1984),  # 36,210 tokens/s for 35.29 s, as published
        ("C6", 2_211_840, 256 * 1920),  # 36,682 tokens/s for 60.30 s
        ("D256", 256 * 768, 256 * 768),
        ("D256-32", 256 * 544, 256 * 544),  # 1,330 tokens/s for 104.7 s
        ("D16", 16 * 768, 16 * 768),
        ("D1", 80, 80),
        ("D8", 8 * 99, 8 * 99),
    ],
)
def test_a_preset_sends_as_many_tokens_as_the_published_run(
    name: str, sent: int, distinct: int
) -> None:
    work = make_work(PRESETS[name].spec, VOCAB, max_context=8192)
    assert sent_tokens(work) == sent
    assert work.kv_tokens == distinct


def test_prompts_are_the_ids_of_the_seeded_generator_in_order() -> None:
    work = make_work(PRESETS["C6"].spec, VOCAB)
    rng = random.Random(1004)
    first = [[rng.randrange(1000, VOCAB - 1000) for _ in range(896)] for _ in range(256)]
    assert [session.turns[0].make_tokens() for session in work.sessions] == first


def test_equal_seeds_make_equal_work_and_others_do_not() -> None:
    spec = Spec("multiturn", users=3, turns=2, first_tokens=8, new_tokens=4)
    same, other = (Spec(**{**spec.as_dict(), "seed": seed}) for seed in (1000, 1001))
    assert prompts_of(make_work(spec, VOCAB)) == prompts_of(make_work(same, VOCAB))
    assert prompts_of(make_work(spec, VOCAB)) != prompts_of(make_work(other, VOCAB))


def test_ids_keep_clear_of_both_ends_of_the_vocabulary() -> None:
    assert token_range(VOCAB) == (1000, VOCAB - 1000)
    assert token_range(512) == (128, 384)


def test_each_request_has_a_seed_of_its_own_the_same_in_every_run_and_none_where_greedy() -> None:
    spec = Spec("multiturn", users=3, turns=2, first_tokens=8, new_tokens=4, temperature=0.7)

    def seeds(spec: Spec) -> list[int | None]:
        work = make_work(spec, VOCAB)
        return [work.sampling_seed(user, turn) for user in range(3) for turn in range(2)]

    found = seeds(spec)
    assert None not in found and len(set(found)) == 6
    assert seeds(spec) == found
    assert not set(seeds(replace(spec, seed=2))) & set(found)
    assert set(seeds(replace(spec, temperature=0.0))) == {None}
    due = Play(make_work(spec, VOCAB)).take_due(0.0)
    assert due is not None and due.seed == found[0]
    assert "temperature 0.7" in make_work(spec, VOCAB).title
    greedy = make_work(replace(spec, temperature=0.0), VOCAB)
    assert prompts_of(greedy) == prompts_of(make_work(spec, VOCAB))
    with pytest.raises(ConfigError, match="temperature is -1"):
        Spec("unshared", temperature=-1.0)


def test_sessions_arrive_at_the_rate_asked_for_and_as_the_seed_has_it() -> None:
    spec = Spec("unshared", users=400, first_tokens=1, output_tokens=1, rate_per_s=20.0)
    times = [session.arrival_s for session in make_work(spec, VOCAB).sessions]
    assert times == sorted(times)
    assert times == [session.arrival_s for session in make_work(spec, VOCAB).sessions]
    assert 15 < times[-1] < 25
    gaps = [b - a for a, b in pairwise(times)]
    short = sum(gap < 0.05 for gap in gaps) / len(gaps)  # exponential: 63 % below the mean
    assert 0.55 < short < 0.72


def test_a_prefix_is_shared_by_every_nth_user() -> None:
    spec = Spec("shared-prefix", users=4, first_tokens=3, prefix_tokens=10, num_prefixes=2)
    work = make_work(spec, VOCAB)
    prompts = [turns[0] for turns in prompts_of(work)]
    assert prompts[0][:10] == prompts[2][:10] == list(work.prefixes[0])
    assert prompts[1][:10] == prompts[3][:10] != prompts[0][:10]
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert [turns[0] for turns in prompts_of(prefix_work(work))] == [
        list(prefix) for prefix in work.prefixes
    ]


def test_filler_is_as_long_as_asked_for() -> None:
    for num_tokens in (928, 5000, 131_072):
        work = filler(num_tokens, 928, VOCAB)
        assert num_tokens <= sum(s.turns[0].num_tokens for s in work.sessions) < num_tokens * 1.1
        assert work.longest_context < 928


def test_a_workload_longer_than_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(ConfigError, match=r"contexts of 288 tokens but .* serve 200"):
        make_work(Spec("unshared", first_tokens=256), VOCAB, max_context=200)


@pytest.mark.parametrize("workload", sorted(DEFAULTS.keys() - TEXTS))
def test_a_play_sends_each_turn_after_the_one_before_with_its_answer(workload: str) -> None:
    work = make_work(DEFAULTS[workload], VOCAB)
    play = Play(work)
    contexts: dict[int, list[int]] = {}
    now_s = 0.0
    while not play.is_over:
        while (due := play.take_due(now_s)) is not None:
            record = due.record
            turn = work.sessions[record.session].turns[record.turn]
            new = turn.make_tokens()
            expected = contexts.get(record.session, []) + new if turn.extends else new
            assert due.prompt == expected
            answer = [record.session, record.turn] * due.output_tokens
            answer = answer[: due.output_tokens]
            for token in answer:
                now_s += 0.5
                play.on_tokens(record, (token,), now_s)
            play.on_end(record, now_s)
            contexts[record.session] = due.prompt + answer
    assert play.num_ended == work.num_requests == len(play.records)
    assert play.prompt_tokens + play.output_tokens == sent_tokens(work)
    assert set(play.gaps_s) == {0.5}


def test_a_session_whose_request_fails_sends_no_more() -> None:
    work = make_work(Spec("multiturn", users=2, turns=3, first_tokens=4), VOCAB)
    play = Play(work)
    first = play.take_due(0.0)
    second = play.take_due(0.0)
    assert first is not None and second is not None
    play.on_end(first.record, 1.0, "no room")
    play.on_end(second.record, 1.0)
    assert play.num_failed == 1
    due = play.take_due(1.0)
    assert due is not None and due.record.session == 1
    assert play.take_due(1.0) is None


def write_trace(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS: list[dict[str, object]] = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 10, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 1500, "output_length": 20, "hash_ids": [0, 1, 3]},
    {"timestamp": 5000, "input_length": 600, "output_length": 30, "hash_ids": [0, 9]},
]


def test_a_trace_shares_the_beginnings_that_its_hashes_share(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", ROWS)
    work = make_work(Spec("trace", trace=trace, time_scale=0.5), VOCAB)
    one, two, three = (turns[0] for turns in prompts_of(work))
    assert (len(one), len(two), len(three)) == (1100, 1500, 600)
    assert one[:1024] == two[:1024] and one[1024] != two[1024]
    assert one[:512] == three[:512] and one[512:600] != three[512:]
    assert [session.arrival_s for session in work.sessions] == [0.0, 1.0, 2.0]
    assert [session.first_turn for session in work.sessions] == [0, 1, 0]
    assert [session.turns[0].known_tokens for session in work.sessions] == [0, 1024, 512]
    assert work.kv_tokens == 1110 + 1520 - 1024 + 630 - 512


def test_a_trace_can_be_scaled_and_what_is_too_long_is_left_out(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", ROWS)
    work = make_work(Spec("trace", trace=trace, length_scale=0.125), VOCAB, max_context=180)
    assert [session.prompt_lengths() for session in work.sessions] == [[138], [75]]
    assert work.num_skipped == 1
    assert "1 too long and left out" in work.title
    with pytest.raises(ConfigError, match=r"give length_scale below 0\.125"):
        make_work(Spec("trace", trace=trace, length_scale=0.125), VOCAB, max_context=20)


def test_picking_sessions_keeps_whole_conversations(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.jsonl", ROWS)
    sizes = set()
    for seed in range(6):
        work = make_work(Spec("trace", trace=trace, max_sessions=1, seed=seed), VOCAB)
        sizes.add(len(work.sessions))
        assert work.sessions[0].arrival_s == 0.0
    assert sizes == {1, 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no requests"),
        ("{]\n", "line 1: expected an object with timestamp"),
        ('{"timestamp": 0}\n', "line 1: expected an object"),
        ("[1]\n", "line 1: expected an object"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
            "one id for each 512 tokens",
        ),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_choosing_a_workload_does_not_import_torch() -> None:
    code = "import sys, hotset.cli.bench; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
