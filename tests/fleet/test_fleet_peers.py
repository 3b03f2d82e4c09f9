"""A replica finds what it lacks in the host memory of the one that the router names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fleets import fleet, wait_for

from hotset.engine.completion import gather
from hotset.engine.messages import Submit
from hotset.fleet.index import BITS
from hotset.fleet.router import CostRoute, _Keys, _Offer
from hotset.request import SamplingParams

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


class ToColdest(CostRoute):
    """Takes the replica that has least of the prompt."""

    def _best(self, offers: Sequence[_Offer], num_tokens: int, now_s: float) -> _Offer:
        return min(offers, key=lambda offer: offer.estimate.found_tokens)


def test_a_cold_replica_fetches_from_the_peer_that_is_named_and_answers_the_same(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    secret.chmod(0o600)
    route = ToColdest()
    with fleet(0, route, host_gib=0.01, fetch_policy="fetch") as front:
        for name in ("warm", "cold"):
            url = f"unix://{tmp_path / name}"
            front.options = front.options.but(peer_url=url, remote_secret_file=secret)
            front.add()
        warm, cold = front.hosts
        outlook = route._members["r0"].outlook
        wait_for(lambda: all(one.outlook.index.is_exact for one in route._members.values()))

        def answer(prompt: list[int]) -> list[int]:
            return list(gather(front.service.submit(prompt, PARAMS), 1)[0].token_ids)

        def is_in_host(prompt: list[int]) -> bool:
            keys = _Keys(Submit("", prompt, PARAMS)).of(outlook)
            return outlook.index.prefix(keys, BITS["host"]) == len(keys)

        for number in range(5, 45):
            prompt = [number, *range(5, 100)]
            expected = answer(prompt)
            wait_for(partial(is_in_host, prompt))
            assert answer(prompt) == expected
            if cold.metrics.cached_tokens["peer"]:  # not while it yet connects to its peer
                break
        assert cold.metrics.cached_tokens["peer"] > 0 and cold.metrics.moved_bytes["peer>host"] > 0
        assert warm.metrics.cached_tokens["peer"] == 0
        routed = front.service.fleet().counts.routed
        assert {replica_id for replica_id, _ in routed} == {"r0", "r1"}
