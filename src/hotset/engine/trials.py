"""Steps that are run at start to take their time."""

import time

from hotset.engine.sizing import Sizes
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.executor.runner import ModelRunner
from hotset.request import SamplingParams
from hotset.sequence import Request

_NUM_TOKENS = (32, 256)  # of the prompts


def time_prompts(sizes: Sizes, runner: ModelRunner, most_in_step: int) -> list[tuple[int, float]]:
    """Tokens and seconds of steps of one prompt: a short one and one of a usual size.

    Their KV goes to the first blocks, which no request has yet.
    """
    trials, first = [], sizes.first_block
    for most_tokens in _NUM_TOKENS:
        num_tokens = min(most_tokens, most_in_step, sizes.max_model_len)
        request = Request("rate", num_tokens, [0] * num_tokens, SamplingParams(), num_tokens)
        request.kv.block_table = list(range(first, first - (-num_tokens // sizes.block_size)))
        step = make_step_input(Step([StepItem.of(request, 0, num_tokens)]), sizes.block_size)
        runner.forward(step).sum().item()  # the first run also allocates
        start_s = time.perf_counter()
        runner.forward(step).sum().item()  # waits for the device
        trials.append((num_tokens, time.perf_counter() - start_s))
    return trials
