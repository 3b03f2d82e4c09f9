"""The arguments of the Ray Serve application, and how many replicas its policy asks for."""

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest

from hotset.errors import ConfigError
from hotset.fleet import app
from hotset.fleet.app import ScalingPolicy, read_args

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")


def test_arguments_are_options_of_the_engine_and_of_the_fleet() -> None:
    given = {"model": "m", "host_gib": 4, "replicas": 2, "drain_s": 5, "directory": "/run/x"}
    options, replica, scaling = read_args(json.loads(json.dumps(given)))
    assert (options.model.model, options.memory.host_gib) == ("m", 4)
    assert (scaling.replicas, scaling.most, replica.drain_s) == (2, 2, 5)
    assert str(replica.directory) == "/run/x"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"modle": "m"}, "there is no option 'modle'"),
        ({"replicas": 0}, "replicas is 0; expected 1 or more"),
        ({"drain_s": "long"}, "drain_s is 'long'; expected a whole number"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_by_name(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_args(given)


@needs_ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own modules
def test_an_application_asks_for_a_gpu_per_rank_on_one_node_and_time_to_drain() -> None:
    def deployment(**args: Any) -> Any:
        return app.build(args)._bound_deployment

    two = deployment(model="m", tp=2, replicas=3, drain_s=7)
    assert two.num_replicas == 3
    config = two._replica_config
    assert config.placement_group_bundles == [{"CPU": 1, "GPU": 2}]
    assert config.placement_group_strategy == "STRICT_PACK"
    assert two._deployment_config.graceful_shutdown_timeout_s >= 7 + 65
    cpu = deployment(model="m", device="cpu", max_replicas=4)
    assert cpu._replica_config.placement_group_bundles is None
    assert cpu._replica_config.resource_dict["CPU"] == 1  # none of a head's, which has none
    scaling = cpu._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    policy = scaling.policy.get_policy()(**scaling.policy.policy_kwargs)
    assert policy(SimpleNamespace(raw_metrics={})) == (1, {})


def test_the_policy_follows_what_replicas_say_last() -> None:
    def context(*queued: int) -> Any:
        def series(value: float) -> dict[str, Any]:
            return {
                f"r{i}": [SimpleNamespace(value=0.0), SimpleNamespace(value=value)]
                for i, _ in enumerate(queued)
            }

        metrics = {name: series(1000.0) for name in ("usable_blocks", "spare_blocks")}
        metrics |= {"prefill_tokens_per_s": series(100.0), "prefilled_tokens": series(0.0)}
        metrics["queued_tokens"] = {
            f"r{i}": [SimpleNamespace(value=float(n))] for i, n in enumerate(queued)
        }
        return SimpleNamespace(raw_metrics=metrics)

    policy = ScalingPolicy(replicas=1, max_replicas=5, wait_target_s=2)
    assert policy(context(0)) == (1, {})
    assert policy(context(500)) == (3, {})  # 5 s wait, 2 s may on each
    assert policy(context(0, 0)) == (3, {})  # not down at once
    assert policy(context(5000, 5000)) == (5, {})
