"""A step's tokens as flat arrays, and the fixed places that recorded steps read them from."""

import numpy as np
import torch

from hotset.attention.batch import SEAT
from hotset.attention.inputs import copy_batch
from hotset.engine.step import Step, StepItem
from hotset.engine.step_input import make_step_input
from hotset.executor.graphs import StaticInputs
from hotset.executor.recorded_sizes import fastest, sizes_up_to
from hotset.request import SamplingParams
from hotset.sequence import UNKNOWN_TOKEN, Request


def make_request(tokens: list[int], table: list[int], pending_row: int | None = None) -> Request:
    request = Request("r", len(tokens), tokens, SamplingParams(), 100)
    request.kv.block_table = table
    request.pending_row = pending_row
    return request


def test_decodes_come_first_and_rows_are_those_of_the_plans_order() -> None:
    items = [
        StepItem.of(
            make_request(list(range(10, 17)), [5, 2]), 1, 5
        ),  # a chunk that does not sample
        StepItem.of(make_request([20, 21, 22], [7]), 2, 1),
        StepItem.of(make_request(list(range(30, 36)), [0, 9]), 3, 3),
        StepItem.of(make_request([40, 41, 42, 43, UNKNOWN_TOKEN], [1, 3], pending_row=6), 4, 1),
    ]
    batch = make_step_input(Step(items), 4).batch
    inputs, rows = copy_batch(batch, torch.device("cpu"))
    assert batch.num_decodes == 2
    assert [s.num_tokens for s in batch.sequences] == [1, 1, 5, 3]
    assert [s.start for s in batch.sequences] == [0, 1, 2, 7]
    assert [s.context_len for s in batch.sequences] == [3, 5, 6, 6]
    assert inputs.token_ids.tolist() == [22, 0, 11, 12, 13, 14, 15, 33, 34, 35]
    assert inputs.positions.tolist() == [2, 4, 1, 2, 3, 4, 5, 3, 4, 5]
    assert inputs.blocks.tolist() == [7, 3, 5, 5, 5, 2, 2, 0, 9, 9]
    assert inputs.offsets.tolist() == [2, 0, 1, 2, 3, 0, 1, 3, 0, 1]
    assert rows.tolist() == [0, 9, 1]  # of the second, third and fourth item
    assert batch.has_unknown
    previous = torch.arange(100, 110)
    assert inputs.resolve(previous).tolist() == [22, 106, *range(11, 16), 33, 34, 35]


def test_a_recorded_step_reads_the_steps_tokens_and_padding_beyond_them() -> None:
    padding = np.array([0, 0, 99, 0, -1, -1], np.int64)
    static = StaticInputs.make(4, 2, padding, torch.zeros(8, dtype=torch.long))
    batch = make_step_input(Step([StepItem.of(make_request([20, 21, 22], [7]), 0, 3)]), 4).batch
    static.fill(batch.inputs, batch.sampled_rows, padding)
    assert static.inputs.token_ids.tolist() == [20, 21, 22, 0]
    assert static.inputs.blocks.tolist() == [7, 7, 7, 99]
    assert static.inputs.sources.tolist() == [-1, -1, -1, -1]
    assert static.inputs.seats.tolist() == [-1, -1, -1, -1]
    assert static.rows.tolist() == [2, 0]


def test_sizes_reach_what_a_step_can_have_and_no_further() -> None:
    assert sizes_up_to((1, 2, 4, 8), 4) == [1, 2, 4]
    assert sizes_up_to((1, 2, 4, 8), 5) == [1, 2, 4, 5]
    assert sizes_up_to((1, 2, 4, 8), 20) == [1, 2, 4, 8]


def test_a_step_runs_in_the_fastest_recorded_size_that_holds_it() -> None:
    assert fastest([2, 4, 6], [1.0, 3.0, 2.0]) == [0, 0, 0, 2, 2, 2, 2]
    assert fastest([1, 2], [1.0, 1.0]) == [0, 0, 1]  # of equal ones the smaller


def test_a_step_tells_the_seats_of_its_hot_requests() -> None:
    requests = [make_request([20, 21, 22], [7]) for _ in range(2)]
    requests[1].kv.seat = 3
    items = [StepItem.of(request, 2, 1) for request in requests]
    assert make_step_input(Step(items), 4).batch.inputs[SEAT].tolist() == [-1, 3]
