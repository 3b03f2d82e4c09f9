"""Where requests go, by what replicas tell: the worked examples of the cost, ties, and faults."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from fakes import FakeClock
from fleets import fleet, wait_for

from hotset.engine.completion import gather
from hotset.engine.messages import EngineInfo, Load, Report, Submit
from hotset.fleet.outlook import Estimate, Outlook, Speed, mean_speed
from hotset.fleet.route import Choice
from hotset.fleet.router import ROUTES, CostRoute, KnowingRoute, PrefixRoute
from hotset.fleet.status import Why
from hotset.kv.block_hash import block_hash, root_hash
from hotset.memory.journal import JournalPart
from hotset.options import Options
from hotset.request import Resumed, SamplingParams

# Llama-3.1-8B on one H200, over a link of 50 GB/s.
RATE, KV_BYTES, LINK = 35_000.0, 131_072, 50e9
PROMPT, WARM, BLOCK = 12_035, 11_000, 8
DEVICE, HOST, REMOTE = 1, 3, 7  # codes of what is there
LOAD = Load(
    queued_tokens=0,
    spare_blocks=2**30,
    usable_blocks=2**30,
    queued_bytes=0,
    num_open=1,
    step_s=0.0,
    prefill_tokens_per_s=RATE,
    link_bytes_per_s={"host": LINK},
    prefilled_tokens=0,
    prompt_step_s=0.0,
    freed_blocks=0,
)


def info(fingerprint: str = "model", block_size: int = BLOCK, **options: Any) -> EngineInfo:
    options = Options.of(**options)
    return EngineInfo(options, 10**6, "", False, fingerprint, block_size, KV_BYTES)


@dataclass
class Host:
    """What a route asks of a host."""

    info: EngineInfo
    num_follows: int = 0

    def follow(self, is_on: bool) -> None:
        assert is_on
        self.num_follows += 1


def keys_of(token_ids: list[int], fingerprint: str = "model", salt: bytes = b"") -> list[bytes]:
    key, keys = root_hash(fingerprint, salt), []
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        key = block_hash(key, token_ids[start : start + BLOCK])
        keys.append(key)
    return keys


def snapshot(keys: list[bytes], code: int = DEVICE, first: int = 0) -> JournalPart:
    content = b"".join(key + bytes([code]) for key in keys)
    return JournalPart(first, b"", content, begins=True, ends=True)


class Fleet:
    """A route with replicas that tell what a test has them tell."""

    def __init__(self, route: type[KnowingRoute], names: str = "ab", **options: Any) -> None:
        self.clock, self.num_sent = FakeClock(), 0
        self.route = route(self.clock, seed=0)
        self.hosts = {name: Host(info(**options)) for name in names}
        for name, host in self.hosts.items():
            self.route.join(name, host)  # type: ignore[arg-type]
            self.tell(name, snapshot([]))

    def tell(self, name: str, journal: JournalPart | None = None, **changes: Any) -> None:
        self.route.take(name, Report(0.0, journal=journal, load=replace(LOAD, **changes)))

    def journal(self, name: str, part: JournalPart) -> None:
        self.route.take(name, Report(0.0, journal=part))

    def busy(self, share: float) -> None:
        """All replicas have computed for this share of the last ten seconds."""
        self.clock.now_s += 20.0
        for done in (0.0, share):
            for name in self.hosts:
                self.tell(name, prompt_step_s=done * 10)
            self.clock.now_s += 10.0
        self.clock.now_s -= 10.0

    def choose(
        self, token_ids: list[int], names: Sequence[str] | None = None, **submit: Any
    ) -> Choice:
        self.num_sent += 1
        one = Submit(f"id-{self.num_sent}", token_ids, SamplingParams(), **submit)  # type: ignore
        return self.route.choose(one, list(names or self.hosts))


def prompt(length: int = PROMPT) -> list[int]:
    return random.Random(3).choices(range(1000), k=length)


def lost(journal: JournalPart) -> JournalPart:
    return replace(journal, first=journal.first + 5)


def estimates(queued: int) -> tuple[Estimate, Estimate]:
    """Of the example: a replica with 11,000 tokens in host memory, and a cold one."""
    keys = keys_of(prompt())
    warm, cold = Outlook(info()), Outlook(info())
    warm.index.take(snapshot(keys[: WARM // BLOCK], HOST))
    warm.take(replace(LOAD, queued_tokens=queued), 0.0)
    cold.take(LOAD, 0.0)
    rest = {"in_remote": 0, "others": mean_speed([warm.speed(), cold.speed()])}
    return warm.estimate(keys, PROMPT, 0.0, **rest), cold.estimate(keys, PROMPT, 0.0, **rest)


def test_a_warm_replica_is_predicted_as_the_design_has_it() -> None:
    warm, cold = estimates(0)
    assert (warm.found_tokens, warm.computed_tokens) == (WARM, PROMPT - WARM)
    assert (cold.found_tokens, cold.computed_tokens) == (0, PROMPT)
    assert warm.ttft_s == pytest.approx(0.058, abs=0.0005)
    assert cold.ttft_s == pytest.approx(0.344, abs=0.0005)


@pytest.mark.parametrize(("weight", "limit"), [(0.0, 9_991), (1.0, 20_991), (5.0, 64_991)])
def test_a_warm_replica_is_left_when_that_many_tokens_queue_there(
    weight: float, limit: int
) -> None:
    warm, cold = estimates(limit - 2)
    assert warm.cost_s(weight) < cold.cost_s(weight)
    warm, cold = estimates(limit + 2)
    assert warm.cost_s(weight) > cold.cost_s(weight)


def test_a_fixed_threshold_is_the_case_of_one_weight() -> None:
    """llm-d leaves a warm endpoint at 14 s of queue: for 65,000 warm tokens that is 3.4."""
    rate, warm_tokens, queued = 20_480.0, 65_000, 286_720
    saved_s = warm_tokens / rate
    warm = Estimate(warm_tokens, 0, queued, 1, queued / rate, 0.0, rate)
    cold = Estimate(0, warm_tokens, 0, 1, 0.0, saved_s, rate)
    assert queued / rate == 14.0 and saved_s == pytest.approx(3.17, abs=0.005)
    assert warm.cost_s(3.4) > cold.cost_s(3.4)
    assert warm.cost_s(3.42) < cold.cost_s(3.42)


@pytest.mark.parametrize(
    ("busy", "stays", "leaves"),
    [(0.0, 9_000, 10_800), (0.5, 19_000, 22_500), (0.95, 61_000, 69_000)],
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


def test_a_mean_speed_counts_each_by_its_tokens() -> None:
    assert mean_speed([]).rate == 1000.0
    speeds = [Speed(0, 0.0, 0.0), Speed(100, 30.0, 0.1), Speed(300, 50.0, 0.3)]
    assert mean_speed(speeds) == pytest.approx((400, 45.0, 0.25))
