"""Fields of configs that the planner does not read though they change a model's size.

For each family of `tests/cost/test_plan_against_transformers.py`, each field of its config in
turn gets another value, in a config as it comes and in one as transformers writes it. Where
transformers builds a model of it, on the meta device, the planner must count the same parameters
or refuse the config. Prints what differs; nothing is what one hopes for.

    python benchmarks/planner_fields.py [FAMILY ...]
"""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from hotset.cost.families import shape_from_config
from hotset.errors import PlanError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/cost"))
from test_plan_against_transformers import FAMILIES, TINY

# No sizes, or sizes of which every value is in the tests.
LEFT_OUT = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}


def other_values(value: Any) -> Iterator[Any]:
    """Some values of the same kind as `value`, or of any where it says nothing."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2 or 2)
    elif value is None:
        yield from (1, 2, True)
    elif isinstance(value, list):
        if not value:
            yield from ([1], [2])
        elif isinstance(value[0], str):
            yield value[::-1]
            yield from ([each] * len(value) for each in sorted(set(value)))
        elif isinstance(value[0], int):
            yield from (value[::-1], [*value[:-1], value[-1] + 1])


def num_params(config: dict[str, Any]) -> int | None:
    """Of the model that transformers builds; None where it builds none."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except Exception:  # whatever: such a config is none
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    num_checked = num_off = 0
    for model_type, facts in FAMILIES:
        if sys.argv[1:] and model_type not in sys.argv[1:]:
            continue
        config = {**TINY, **facts, "model_type": model_type}
        written = AutoConfig.for_model(**config).to_dict()
        for form in (config, {k: v for k, v in written.items() if k not in LEFT_OUT}):
            for field in sorted({*config, *written} - LEFT_OUT):
                for value in other_values(written.get(field)):
                    changed = {**copy.deepcopy(form), "model_type": model_type, field: value}
                    built = num_params(changed)
                    if built is None:
                        continue
                    num_checked += 1
                    try:
                        planned = shape_from_config(changed, model_type).total_params
                    except PlanError:
                        continue
                    if planned != built:
                        num_off += 1
                        print(f"{model_type}: {field} {value!r}: {planned:,} planned, {built:,}")
    print(f"{num_checked:,} configs, {num_off} with other sizes", file=sys.stderr)


if __name__ == "__main__":
    main()
