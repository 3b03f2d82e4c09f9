"""Where requests go, by what replicas tell: costs, ties, and faults."""

from dataclasses import replace

import pytest
from fleets import fleet, wait_for
from routed import (
    BLOCK,
    DEVICE,
    HOST,
    LINK,
    PROMPT,
    RATE,
    REMOTE,
    WARM,
    Fleet,
    Host,
    info,
    keys_of,
    prompt,
    snapshot,
)

from hotset.engine.completion import gather
from hotset.engine.messages import Submit
from hotset.fleet.route import Choice
from hotset.fleet.router import ROUTES, CostRoute, KnowingRoute, PrefixRoute
from hotset.fleet.status import Why
from hotset.memory.journal import JournalPart
from hotset.request import Resumed, SamplingParams


def lost(journal: JournalPart) -> JournalPart:
    return replace(journal, first=journal.first + 5)


@pytest.mark.parametrize(
    ("busy", "stays", "leaves"),
    [(0.0, 17_200, 17_400), (0.5, 29_400, 29_600), (0.95, 78_200, 78_400)],
)
def test_the_busier_the_fleet_the_longer_a_warm_replica_is_kept(
    busy: float, stays: int, leaves: int
) -> None:
    fleet = Fleet(CostRoute)
    fleet.journal("a", snapshot(keys_of(prompt())[: WARM // BLOCK], HOST))
    fleet.route._members["a"].outlook.index.doubt()
    fleet.journal("a", snapshot(keys_of(prompt())[: WARM // BLOCK], HOST))
    for queued, expected in ((stays, ("a", Why.PREFIX)), (leaves, ("b", Why.LOAD))):
        fleet.busy(busy)
        for name, num in (("a", queued), ("b", 0)):
            fleet.tell(name, queued_tokens=num, prompt_step_s=busy * 10)
        choice = fleet.choose(prompt())
        assert (choice.replica_id, choice.why) == expected
        computed = PROMPT - WARM if expected[0] == "a" else PROMPT
        assert choice.expected_tokens == computed
        assert choice.expected_ttft_s >= computed / RATE


def test_what_is_found_again_is_kept_the_longer_the_more_of_it_there_is() -> None:
    def kept(found: int) -> bool:
        """With 14,000 tokens where the conversation is, after prompts of which so many were."""
        fleet = Fleet(CostRoute)
        fleet.journal("a", snapshot(keys_of(prompt())[: WARM // BLOCK], HOST))
        fleet.route._members["a"].outlook.index.doubt()
        fleet.journal("a", snapshot(keys_of(prompt())[: WARM // BLOCK], HOST))
        for number in range(100):
            submit = Submit(f"before-{number}", prompt(10_000), SamplingParams())
            fleet.route.found(Choice("b", Why.LOAD), submit, found, 0.1)
        fleet.tell("a", queued_tokens=14_000)
        return fleet.choose(prompt()).replica_id == "a"

    assert not kept(0) and kept(5_000) and kept(9_999)


def test_what_was_sent_since_the_last_load_counts() -> None:
    fleet = Fleet(CostRoute, "abc")
    first = [fleet.choose([i] * 4000).replica_id for i in range(3)]
    assert sorted(first) == ["a", "b", "c"]  # none of them has told of a request yet
    fleet.clock.now_s = 0.2
    fleet.tell(first[0])  # counts what was sent 0.2 s ago: it is done
    assert fleet.choose([7] * 4000).replica_id == first[0]
    begun, there = Submit("id", [8] * 4000, SamplingParams()), [first[1]]

    def ttft_s() -> float:
        return fleet.route.choose(begun, there).expected_ttft_s

    assert ttft_s() == pytest.approx(2 * 4000 / RATE)
    assert ttft_s() == pytest.approx(3 * 4000 / RATE)  # behind itself, as it was sent
    fleet.route.found(Choice(first[1], Why.LOAD, 4000), begun, 0, 0.1)
    assert ttft_s() == pytest.approx(2 * 4000 / RATE)
    fleet.clock.now_s = 6.0  # none of these was heard of again: they were refused
    assert ttft_s() == pytest.approx(4000 / RATE)


def test_of_replicas_that_are_as_good_the_less_loaded_of_two_is_taken() -> None:
    fleet = Fleet(CostRoute, "abcdef")
    for name in fleet.hosts:
        fleet.tell(name, queued_tokens=0 if name == "a" else 20)
    chosen = []
    for _ in range(60):
        fleet.clock.now_s += 1.0
        for name in fleet.hosts:
            fleet.tell(name, queued_tokens=0 if name == "a" else 20)
        chosen.append(fleet.choose(prompt()).replica_id)
    assert set(chosen) == set("abcdef") and 10 < chosen.count("a") < 45  # 1 in 3 of pairs


def test_a_replica_without_free_blocks_is_left_alone() -> None:
    fleet = Fleet(CostRoute)
    fleet.journal("a", snapshot([], first=0))
    fleet.tell("a", spare_blocks=0, freed_blocks=0)
    fleet.clock.now_s = 5.0
    fleet.tell("a", spare_blocks=0, freed_blocks=500)  # 100 per second; 50 are needed
    choice = fleet.choose(prompt(400), "a")
    assert choice.expected_ttft_s == pytest.approx(0.5 + 400 / RATE)
    assert fleet.choose(prompt(400)).replica_id == "b"


def test_prefix_follows_a_long_match_until_requests_crowd_there() -> None:
    def chosen(warm_blocks: int, num_open: int) -> str:
        fleet = Fleet(PrefixRoute, "")
        for name in "abc":
            fleet.hosts[name] = Host(info())
            fleet.route.join(name, fleet.hosts[name])  # type: ignore[arg-type]
            keys = keys_of(prompt())[: warm_blocks if name == "b" else 0]
            num = num_open if name == "b" else 40
            fleet.tell(name, snapshot(keys), num_open=num, queued_tokens=num)
        choice = fleet.choose(prompt())
        assert (choice.replica_id == "b") == (choice.why is Why.PREFIX)
        return choice.replica_id

    assert chosen(1000, 104) == "b"
    assert chosen(1000, 105) != "b"  # 65 more, and 1.5 times as many
    assert chosen(440, 200) != "b"
    assert chosen(440, 80) != "b"  # 3,520 of 12,035 tokens are below 30 %, and more waits there


def test_keys_are_those_of_the_callers_salt_and_the_replicas_model() -> None:
    fleet = Fleet(CostRoute, "ab", block_size=BLOCK)
    fleet.hosts["c"] = Host(info("other"))
    fleet.route.join("c", fleet.hosts["c"])  # type: ignore[arg-type]
    fleet.tell("c", snapshot(keys_of(prompt(), "other", b"salt")))
    own = fleet.choose(prompt(), salt=b"salt")
    assert own.replica_id == "c" and own.expected_tokens == PROMPT - (PROMPT - 1) // BLOCK * BLOCK
    other = fleet.choose(prompt(), "c", salt=b"another")
    assert other.expected_tokens == PROMPT


def test_a_prompt_that_is_computed_whole_finds_nothing_and_a_resumed_one_its_answer() -> None:
    fleet = Fleet(CostRoute, "")
    fleet.hosts["a"] = Host(info())
    fleet.route.join("a", fleet.hosts["a"])  # type: ignore[arg-type]
    tokens = prompt(96)
    fleet.tell("a", snapshot(keys_of(tokens)))
    params = SamplingParams(prompt_logprobs=0)
    assert fleet.route.choose(Submit("id", tokens, params), ["a"]).expected_tokens == 96
    resumed = (Resumed(0, tuple(tokens[50:])),)
    assert fleet.choose(tokens[:50], resumed=resumed).expected_tokens == BLOCK
    off = Fleet(CostRoute, "a", prefix_caching=False)
    off.journal("a", snapshot(keys_of(tokens)))
    assert off.choose(tokens).expected_tokens == 96


def test_what_a_store_has_is_found_from_every_replica_that_reads_it() -> None:
    fleet = Fleet(CostRoute, "")
    for name in "abc":
        fleet.hosts[name] = Host(info())
        fleet.route.join(name, fleet.hosts[name])  # type: ignore[arg-type]
        links = {"host": LINK, "remote": 5e9} if name != "c" else {"host": LINK}
        keys = keys_of(prompt())[:1000] if name == "a" else []
        fleet.tell(name, snapshot(keys, REMOTE), link_bytes_per_s=links)
    assert fleet.choose(prompt(), "b").expected_tokens == PROMPT - 8000
    assert fleet.choose(prompt(), "c").expected_tokens == PROMPT


def with_peers(route: type[KnowingRoute], **there: tuple[int, int, str]) -> Fleet:
    """Replicas by name: blocks of the prompt, the tier they are in, and the fingerprint."""
    fleet = Fleet(route, "")
    for name, (num_blocks, tier, fingerprint) in there.items():
        told = info(fingerprint, peer_url=f"unix:///{name}", remote_secret_file="secret")
        fleet.hosts[name] = Host(told)
        fleet.route.join(name, fleet.hosts[name])  # type: ignore[arg-type]
        fleet.tell(name, snapshot(keys_of(prompt(), fingerprint)[:num_blocks], tier))
    return fleet


def test_a_request_names_the_peer_whose_host_memory_has_more_of_it_than_its_replica() -> None:
    fleet = with_peers(
        CostRoute,
        warm=(1000, HOST, "model"),
        some=(400, HOST, "model"),
        other=(1400, HOST, "another"),
        device=(1200, DEVICE, "model"),
    )
    fleet.hosts["mute"] = Host(info())
    fleet.route.join("mute", fleet.hosts["mute"])  # type: ignore[arg-type]
    fleet.tell("mute", snapshot(keys_of(prompt()), HOST))  # nobody can fetch there
    peers = {name: fleet.choose(prompt(), [name]).peer for name in fleet.hosts}
    nothing = dict.fromkeys(["warm", "other", "device", "mute"])
    assert peers == {"some": "unix:///warm", **nothing}
    assert fleet.choose(prompt(), ["some"], salt=b"salt").peer is None
    fleet.route.leave("warm")
    assert fleet.choose(prompt(), ["some"]).peer is None


@pytest.mark.parametrize("share", ["same", "any"])
def test_blocks_of_others_count_where_these_round_numbers_in_the_same_way(share: str) -> None:
    fleet = Fleet(CostRoute, "")
    for name in "ab":
        told = info(peer_url=f"unix:///{name}", remote_secret_file="s", remote_share=share)
        fleet.hosts[name] = Host(replace(told, numerics=name))
        fleet.route.join(name, fleet.hosts[name])  # type: ignore[arg-type]
    links = {"host": LINK, "remote": LINK}
    for code in (HOST, REMOTE):
        fleet.tell("a", snapshot(keys_of(prompt())[:1000], code), link_bytes_per_s=links)
        fleet.tell("b", snapshot([]), link_bytes_per_s=links)
        choice = fleet.choose(prompt(), "b")
        is_shared = share == "any"
        assert choice.peer == ("unix:///a" if is_shared and code == HOST else None)
        found = 8000 if is_shared and code == REMOTE else 0
        assert choice.expected_tokens == PROMPT - found
        fleet.route._members["a"].outlook.index.doubt()


@pytest.mark.parametrize(("rate", "computed"), [(None, 12_035), (1e6, 12_035), (50e9, 4_035)])
def test_what_a_peer_has_counts_at_the_rate_of_peers(rate: float | None, computed: int) -> None:
    fleet = with_peers(CostRoute, warm=(1000, HOST, "model"), cold=(0, HOST, "model"))
    links = {"host": LINK} | ({} if rate is None else {"peer": rate})
    fleet.tell("cold", link_bytes_per_s=links)
    choice = fleet.choose(prompt(), ["cold"])
    assert choice.peer == "unix:///warm"
    assert choice.expected_tokens == pytest.approx(computed, abs=50)


def test_what_a_peer_has_makes_no_replica_one_that_has_the_prefix() -> None:
    fleet = with_peers(PrefixRoute, warm=(1000, HOST, "model"), cold=(0, HOST, "model"))
    for name in fleet.hosts:
        fleet.tell(name, link_bytes_per_s={"host": LINK, "peer": LINK})
    for _ in range(8):
        choice = fleet.choose(prompt())
        assert (choice.replica_id, choice.why, choice.peer) == ("warm", Why.PREFIX, None)


def test_lost_changes_and_wrong_predictions_ask_for_a_snapshot() -> None:
    fleet = Fleet(CostRoute, "a")
    [host] = fleet.hosts.values()
    assert host.num_follows == 1 and fleet.route.num_snapshots == 0
    fleet.journal("a", lost(JournalPart(0)))
    assert host.num_follows == 2 and fleet.route.num_snapshots == 1
    fleet.journal("a", replace(snapshot([]), first=5))
    fleet.journal("a", JournalPart(5, b"junk"))
    assert host.num_follows == 3

    fleet.journal("a", replace(snapshot(keys_of(prompt())), first=5))
    fleet.clock.now_s = 100.0
    submit = Submit("id", prompt(), SamplingParams())
    for cached, expected in ((11_000, 3), (0, 4)):
        for _ in range(2):
            choice = Choice("a", Why.PREFIX, PROMPT - 12_000, 0.1)
            fleet.route.found(choice, submit, cached, 0.1)
        assert host.num_follows == expected, cached
    for _ in range(4):  # not again at once
        fleet.route.found(choice, submit, 0, 0.1)
    assert host.num_follows == 4


def test_until_a_snapshot_comes_a_route_goes_by_where_it_sent_what() -> None:
    fleet = Fleet(CostRoute, "")
    for name in "ab":
        fleet.hosts[name] = Host(info())
        fleet.route.join(name, fleet.hosts[name])  # type: ignore[arg-type]
    first = fleet.choose(prompt())  # nothing was told at all
    assert first.expected_tokens == PROMPT
    fleet.clock.now_s = 1.0
    for name in "ab":
        fleet.tell(name)
    again = fleet.choose(prompt())
    assert (again.replica_id, again.why) == (first.replica_id, Why.PREFIX)
    assert again.expected_tokens == PROMPT - (PROMPT - 1) // BLOCK * BLOCK


def test_replicas_come_and_go() -> None:
    fleet = Fleet(CostRoute)
    assert fleet.choose(prompt(), "x").replica_id == "x"  # it serves, and has not joined yet
    fleet.route.leave("a")
    fleet.tell("a", snapshot([]))
    fleet.route.found(Choice("a", Why.LOAD, 5), Submit("id", [5], SamplingParams()), 0, 0.1)
    assert fleet.choose(prompt(), "ab").replica_id == "b"


def test_routes_have_the_names_of_the_option() -> None:
    assert list(ROUTES) == ["cost", "prefix", "round-robin", "random"]
    assert all(make().name == name for name, make in ROUTES.items())


def test_a_front_sends_what_follows_to_where_its_prefix_is() -> None:
    """Real engines: what the route predicts of a conversation's turns is what they find."""
    route = PrefixRoute(seed=0)
    with fleet(2, route) as front:
        members = route._members.values()
        wait_for(lambda: all(one.outlook.index.is_exact for one in members))
        went = set()
        texts = [[3 + number, *range(5, 44)] for number in range(2)]
        for turn in range(3):
            for number, text in enumerate(texts):
                before = dict(front.service.fleet().counts.routed)
                stream = front.service.submit(text, SamplingParams(max_tokens=10, ignore_eos=True))
                texts[number] = [*text, *gather(stream, 1)[0].token_ids, 5]
                now = front.service.fleet().counts.routed
                [(replica_id, why)] = [one for one in now if now[one] != before.get(one, 0)]
                went.add((number, replica_id))
                assert turn == 0 or why is Why.PREFIX
        counts = front.service.fleet().counts
        assert len(went) == 2  # each conversation stayed where it began
        assert counts.num_predicted == 6 and counts.snapshots == 0
        # Found, too, is what an answer left of a block that it did not fill.
        assert 0 < counts.predicted_tokens <= counts.found_tokens < counts.predicted_tokens + 4 * 16
        assert counts.real_ttft_s > 0 and counts.predicted_ttft_s > 0
        front.service.close()
        front.check()


def test_a_replica_that_has_hardly_been_measured_gets_its_share() -> None:
    """Equal machines: one has got faster by its requests, the other still has its first figure."""
    fleet = Fleet(CostRoute)
    fleet.tell("a", prefill_tokens_per_s=3_000.0, step_s=0.03)
    fleet.tell("b", prefill_tokens_per_s=52_000.0, step_s=0.005, prefilled_tokens=5_000)
    chosen = [fleet.choose([number] * 100).replica_id for number in range(12)]
    assert 4 <= chosen.count("a") <= 8

    fleet.clock.now_s = 10.0  # it is slower indeed
    fleet.tell("a", prefill_tokens_per_s=3_000.0, step_s=0.03, prefilled_tokens=500_000)
    fleet.tell("b", prefill_tokens_per_s=52_000.0, step_s=0.005, prefilled_tokens=500_000)
    chosen = [fleet.choose([50 + number] * 100).replica_id for number in range(12)]
    assert chosen.count("a") < 3
