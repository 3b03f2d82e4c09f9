"""What a person sees of a fleet: the status page, `hotset top`, and metrics."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from fleet_views import fleet_of
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from servers import build, running_server, wait_for

from hotset.cli.top import command, fetch
from hotset.cli.top_view import view
from hotset.engine.service import EngineService
from hotset.engine.status import EngineStatus
from hotset.fleet.front_pages import FrontPages
from hotset.fleet.status import FleetStatus
from hotset.options import Options
from hotset.server.app import ServerConfig

Show = Callable[[FleetStatus], None]


class Front(EngineService):
    """An engine that says that it is a fleet."""

    def __init__(self) -> None:
        self.fleets = [fleet_of(1)]
        super().__init__(Options.of(hot_gib=0.01), build=build)

    def fleet(self) -> FleetStatus:
        return self.fleets[-1]


@pytest.fixture(scope="module")
def shown() -> Iterator[tuple[str, Show]]:
    """A front's address, and what sets the fleet that it is to have."""
    with running_server(start=Front) as server:
        assert isinstance(server.service, Front)
        yield server.url, server.service.fleets.append


@contextmanager
def getting(url: str) -> Iterator[Callable[[str], httpx.Response]]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        yield http.get


def metrics_of(url: str) -> str:
    with getting(url) as get:
        return get("/metrics").text


@pytest.mark.parametrize(
    "fleet",
    [
        fleet_of(1, tiers=("device",)),
        fleet_of(2, num_lost=1),
        fleet_of(17, num_draining=1, num_lost=2, tiers=("device", "host", "disk", "remote")),
        fleet_of(0, num_lost=1),
    ],
    ids=["one", "three", "twenty", "all lost"],
)
def test_top_shows_every_replica_and_is_no_wider_than_the_terminal(
    shown: tuple[str, Show], fleet: FleetStatus
) -> None:
    url, show = shown
    show(fleet)
    status = fetch(url, None)
    for width in (80, 120, 160):
        console = Console(width=width)
        with console.capture() as captured:
            console.print(view(status, width, 60))
        text = captured.get()
        assert max(map(len, text.splitlines())) <= width
        for one in fleet.replicas:
            assert f"● {one.replica_id}" in text
            assert not one.why or f"{one.replica_id}: the link ended" in text
    once = CliRunner().invoke(command, ["--url", url, "--once"])
    assert once.exit_code == 0 and "routed by cost" in once.output


def test_the_status_of_a_fleet_is_the_sum_of_its_live_replicas_and_names_the_lost(
    shown: tuple[str, Show],
) -> None:
    url, show = shown
    fleet = fleet_of(2, num_lost=1)
    show(fleet)
    status = fetch(url, None)
    first, second, lost = status["fleet"]["replicas"]
    engines = [one.engine for one in fleet.replicas[:2]]
    assert status["engine"]["num_moving"] == sum(one.num_moving for one in engines if one)
    assert (
        status["engine"]["tiers"][0]["used"]
        == first["tiers"][0]["used"] + (second["tiers"][0]["used"])
    )
    assert (lost["state"], first["state"]) == ("lost", "serving") and lost["why"]
    assert first["routed"] == {"prefix": 400, "load": 100, "retry": 25, "resume": 6}
    assert status["fleet"]["routed"]["prefix"] == 400 + 437 + 474
    assert status["fleet"]["given_up"] == {"poisoned": 1}
    assert status["fleet"]["pause_s"] == {"p50": 0.2, "p99": 5.3}


def test_the_page_shows_all_of_a_fleet_and_nothing_else(shown: tuple[str, Show]) -> None:
    url, show = shown
    show(fleet_of(2, num_lost=1))
    fleet = fetch(url, None)["fleet"]
    with getting(url) as get:
        page = get("/").text
    replica = fleet["replicas"][0]
    for key in [*fleet, *replica, *replica["tiers"][0]]:
        assert re.search(rf"\b{key}\b", page), f"{key} is not shown"
    for name, part in (("f", fleet), ("r", replica)):
        for key in re.findall(rf"\b{name}\.([a-z_]+)\b(?!\()", page):
            assert key in part, f"there is no {name}.{key}"
    for why in fleet["routed"]:
        assert re.search(rf"\b{why}: \[", page), why


def test_metrics_have_the_replica_of_each_engine_and_what_was_done_with_requests(
    shown: tuple[str, Show],
) -> None:
    url, show = shown
    show(fleet_of(2, num_lost=1))
    families = text_string_to_metric_families(metrics_of(url))
    samples = [sample for family in families for sample in family.samples]

    def values(name: str, *labels: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(sample.labels[label] for label in labels): sample.value
            for sample in samples
            if sample.name == name
        }

    tokens = values("hotset:generation_tokens_total", "replica")
    assert tokens == {("replica-0",): 20_000, ("replica-1",): 20_700, ("replica-2",): 21_400}
    # What a lost replica holds is not known, and what it has done is.
    held = values("hotset:tier_used_blocks", "replica", "tier")
    assert {replica for replica, _ in held} == {"replica-0", "replica-1"}
    kept = values("hotset:tier_bytes_total", "replica", "tier", "what")
    assert kept["replica-1", "remote", "first_read"] == 10**7
    assert values("hotset:moved_bytes_total", "source", "target")["host", "remote"] == 10**8
    states = values("hotset:fleet_replicas", "state")
    assert states["serving",] == 2 and states["lost",] == 1 and states["draining",] == 0
    routed = values("hotset:fleet_routed_total", "replica", "why")
    assert routed["replica-1", "load"] == 109
    assert values("hotset:fleet_resumed_total", "why") == {("lost",): 11, ("drained",): 5}
    assert values("hotset:fleet_pause_seconds_count")[()] == 4
    assert values("hotset:fleet_found_tokens_total")[()] == 391_500


def test_a_front_shows_what_all_fronts_on_its_port_did(tmp_path: Path) -> None:
    config = ServerConfig(fronts_path=tmp_path / "fronts")
    other = FrontPages(tmp_path / "fronts", "front-9")
    with running_server(server_config=config, start=Front) as server, getting(server.url) as get:
        page = tmp_path / "fronts/front-0.json"
        wait_for(page.exists)
        alone = fetch(server.url, None)["fleet"]
        text = page.read_text().replace("front-0", "front-9").replace('"load": 100', '"turn": 7')
        other.write(json.loads(text))
        both = fetch(server.url, None)["fleet"]
        samples = get("/metrics").text
    assert (alone["num_fronts"], both["num_fronts"]) == (1, 2)
    assert both["routed"] == {"prefix": 800, "load": 100, "turn": 7, "retry": 50, "resume": 12}
    assert both["replicas"][0]["routed"] == both["routed"]
    assert both["found_tokens"] == 2 * alone["found_tokens"]
    for front in ("front-0", "front-9"):
        label = f'front="{front}"'
        assert f"hotset:fleet_found_tokens_total{{{label}}} 391500.0" in samples
        assert f'hotset:time_to_first_token_seconds_bucket{{{label},le="+Inf"}} 0.0' in samples
    assert samples.count("# TYPE hotset:fleet_routed_total counter") == 1
    assert samples.count("# TYPE hotset:engine_steps_total counter") == 1


def test_a_status_shows_what_its_own_look_has_found() -> None:
    class Looking(Front):
        def status(self) -> "Future[EngineStatus]":
            self.fleets.append(fleet_of(3))  # replicas have told of themselves
            return super().status()

    with running_server(start=Looking) as server:
        status = fetch(server.url, None)
    assert status["engine"]["num_moving"] == sum(
        one["users"]["moving"] for one in status["fleet"]["replicas"]
    )
    assert len(status["fleet"]["replicas"]) == 3


def test_one_engine_has_no_fleet_and_no_label_of_a_replica() -> None:
    with running_server() as server:
        assert fetch(server.url, None)["fleet"] is None
        text = metrics_of(server.url)
    assert "hotset:fleet_" not in text and "replica=" not in text
    assert "\nhotset:engine_steps_total 0.0" in text


def test_panels_of_the_dashboard_name_metrics_and_labels_of_a_fleet(
    shown: tuple[str, Show],
) -> None:
    url, show = shown
    show(fleet_of(2, num_lost=1))
    text = metrics_of(url)
    labels: dict[str, set[str]] = {}
    for name, given in re.findall(r"^hotset:(\w+?)(?:\{(.*)\})? ", text, re.MULTILINE):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', given))
    dashboard = json.loads((Path(__file__).parents[2] / "docs/grafana.json").read_text())
    panels = {panel["title"]: panel for panel in dashboard["panels"]}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = [
        query["expr"]
        for panel in panels.values()
        if panel["gridPos"]["y"] >= panels["Fleet"]["gridPos"]["y"]
        for query in panel.get("targets", ())
    ]
    assert len(asked) > 12
    for query in asked:
        for name in re.findall(r"hotset:(\w+)", query):
            assert name in labels, name
            for wanted in re.findall(r"by \((\w+)\)", query):
                assert wanted in labels[name], query


def test_status_and_metrics_are_there_when_no_replica_is(shown: tuple[str, Show]) -> None:
    url, show = shown
    show(fleet_of(0, num_lost=2))
    status = fetch(url, None)
    assert status["engine"]["tiers"] == [] and len(status["fleet"]["replicas"]) == 2
    assert 'hotset:fleet_replicas{front="front-0",state="lost"} 2.0' in metrics_of(url)


def test_the_page_on_fleets_names_metrics_and_labels_that_there_are(
    shown: tuple[str, Show],
) -> None:
    url, show = shown
    show(fleet_of(2, num_lost=1))
    text = metrics_of(url)
    page = (Path(__file__).parents[2] / "docs/fleet.md").read_text()
    there = set(re.findall(r"^# TYPE hotset:(\w+)", text, re.MULTILINE))
    rows = re.findall(r"^\| (`hotset:fleet_.*?) \|", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(?:hotset:)?(fleet_\w+)", row)}
    assert named == {name for name in there if name.startswith("fleet_")}
    for name, labels in re.findall(r"`(?:hotset:)?(fleet_\w+)\{(.*?)\}", page):
        for label in re.findall(r"\w+", labels.split("=")[0]):
            assert re.search(rf'hotset:{name}{{.*{label}="', text), (name, label)
