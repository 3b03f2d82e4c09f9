import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from sampling import sample
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hotset.engine.step_input import make_sample_input
from hotset.errors import RequestError
from hotset.executor import sampler as sampler_module
from hotset.executor.sampler import Sampled, Sampler, _invert, least_logit
from hotset.request import SamplingParams
from hotset.sequence import Request

VOCAB = 300


def make_request(
    params: SamplingParams,
    *,
    index: int = 0,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
) -> Request:
    return Request("r", len(prompt), [*prompt, *output], params, 1000, index)


def make_logits(rows: int, *, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def sample_many(params: SamplingParams, logits: torch.Tensor, num: int) -> Counter[int]:
    """How often each token is drawn by `num` requests without a seed."""
    sampler = Sampler(logits.shape[1], "cpu", seed=1)
    requests = [make_request(params) for i in range(num)]
    return Counter(sample(sampler, logits.expand(num, -1), requests).token_ids)


def test_greedy_is_the_argmax_in_any_mix_of_requests() -> None:
    logits = make_logits(4)
    mix = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(logprobs=2),
        SamplingParams(temperature=1e-9),
    ]
    sampled = sample(Sampler(VOCAB, "cpu"), logits, [make_request(p) for p in mix])
    best = logits.argmax(-1).tolist()

    assert [sampled.token_ids[i] for i in (0, 2, 3)] == [best[i] for i in (0, 2, 3)]
    assert [entry is None for entry in sampled.logprobs] == [True, True, False, True]


def test_the_logits_given_are_not_changed() -> None:
    logits = make_logits(1)
    before = logits.clone()
    params = SamplingParams(temperature=0.5, top_k=3, repetition_penalty=2.0, logprobs=1)
    sample(Sampler(VOCAB, "cpu"), logits, [make_request(params)])

    assert torch.equal(logits, before)


@pytest.mark.parametrize("nucleus_width", [8, 1024])
@pytest.mark.parametrize("top_k", [0, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_kept_tokens_are_those_of_transformers(
    top_k: int, top_p: float, min_p: float, nucleus_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "_NUCLEUS_WIDTH", nucleus_width)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    logits = make_logits(5)
    expected = warpers(torch.zeros(5, 1, dtype=torch.long), logits.clone()) > -torch.inf

    scaled = logits / 0.7
    limit = least_logit(
        scaled,
        top_k=np.full((5, 1), top_k),
        top_p=np.full((5, 1), top_p, np.float32),
        min_p=np.full((5, 1), min_p, np.float32),
    )
    kept = torch.ones_like(expected) if limit is None else scaled >= limit

    assert torch.equal(kept, expected)


def test_each_row_has_its_own_limits() -> None:
    logits = make_logits(4)
    top_k = np.array([[2], [0], [0], [5]])
    top_p = np.array([[1.0], [0.5], [1.0], [0.9]], np.float32)
    min_p = np.array([[0.0], [0.0], [0.0], [0.2]], np.float32)
    together = least_logit(logits, top_k=top_k, top_p=top_p, min_p=min_p)

    assert together is not None
    for i in range(4):
        row = slice(i, i + 1)
        alone = least_logit(logits[row], top_k=top_k[row], top_p=top_p[row], min_p=min_p[row])
        limit = -torch.inf if alone is None else alone.item()
        assert together[i].item() == limit


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])
    params = SamplingParams(temperature=2.0, top_k=4)
    num = 4000
    drawn = sample_many(params, logits, num)
    expected = (logits.masked_fill(logits == -1.0, -torch.inf) / 2).softmax(-1)[0].tolist()

    assert drawn[3] == 0
    for token, probability in enumerate(expected):
        deviation = (num * probability * (1 - probability)) ** 0.5
        assert abs(drawn[token] - num * probability) <= 4 * deviation


@pytest.mark.parametrize("temperature", [1.0, 1.1e-5, 100.0])
def test_a_token_without_probability_is_never_drawn(temperature: float) -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 20:30] = 1e4
    drawn = sample_many(SamplingParams(temperature=temperature), logits, 500)

    assert set(drawn) <= set(range(20, 30))


def test_a_seeded_request_gets_the_same_tokens_in_any_batch() -> None:
    check_alone_and_in_batches(SamplingParams(temperature=1.0, top_p=0.9, seed=7))


def test_a_seeded_request_with_a_bias_gets_the_same_tokens_in_any_batch() -> None:
    check_alone_and_in_batches(
        SamplingParams(
            temperature=1.0, seed=7, logit_bias={3: 5.0, 250: -100.0}, min_tokens=3, logprobs=1
        )
    )


def check_alone_and_in_batches(params: SamplingParams) -> None:
    others = [
        SamplingParams(temperature=0.9, top_k=50, logit_bias={7: 1.0}, min_tokens=9),
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=8, min_p=0.1, presence_penalty=1.0, logprobs=3),
    ]
    logits = make_logits(4 * 6, seed=3).bfloat16()  # bfloat16 has many equal logits

    def draw(position: int, batch: list[SamplingParams]) -> list[int]:
        sampler = Sampler(VOCAB, "cpu", seed=position)
        requests = [make_request(p) for p in batch]
        tokens = []
        for step in range(6):
            rows = [
                make_logits(1, seed=step).bfloat16() if i == position else logits[[i + step]]
                for i in range(len(batch))
            ]
            tokens.append(sample(sampler, torch.cat(rows), requests).token_ids[position])
        return tokens

    alone = draw(0, [params])
    assert draw(0, [params, *others]) == alone
    assert draw(2, [*others[:2], params, others[2]]) == alone
    assert len(set(alone)) > 1


def test_outputs_of_one_seeded_request_differ_and_are_reproducible() -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=4)
    logits = torch.zeros(4, 10_000)

    def draw() -> list[int]:
        requests = [make_request(params, index=index) for index in range(4)]
        return sample(Sampler(10_000, "cpu"), logits, requests).token_ids

    assert len(set(draw())) == 4
    assert draw() == draw()


def test_requests_without_a_seed_depend_on_the_engine_seed_only() -> None:
    logits = torch.zeros(2, 10_000)

    def draw(seed: int) -> list[int]:
        requests = [make_request(SamplingParams(temperature=1.0)) for _ in "ab"]
        return sample(Sampler(10_000, "cpu", seed=seed), logits, requests).token_ids

    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    assert first[0] != first[1]


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    prompt, output = (3, 4, 4, 9), (11, 12, 11)
    logits = make_logits(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([[*prompt, *output]]), logits.clone()
    )
    got = logits.clone()
    params = SamplingParams(repetition_penalty=1.7)
    Sampler(VOCAB, "cpu")._changes.apply(
        got, make_sample_input([make_request(params, prompt=prompt, output=output)])
    )

    torch.testing.assert_close(got, expected)


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = make_logits(3)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    requests = [
        make_request(SamplingParams()),
        make_request(params, prompt=(1, 2), output=(2, 5, 5)),
        make_request(params, prompt=(1,), output=(7,)),
    ]
    expected = logits.clone()
    expected[1, 2] -= 0.75
    expected[1, 5] -= 1.0
    expected[2, 7] -= 0.75
    sampler = Sampler(VOCAB, "cpu")
    got = logits.clone()
    sampler._changes.apply(got, make_sample_input(requests))
    torch.testing.assert_close(got, expected)

    requests[2].token_ids.append(7)  # the counts go on from where they were
    expected[2, 7] -= 0.25
    got = logits.clone()
    sampler._changes.apply(got, make_sample_input(requests))
    torch.testing.assert_close(got, expected)


def test_a_bias_is_added_to_the_logits_of_its_own_request() -> None:
    logits = make_logits(3)
    best, second = logits[0].topk(2).indices.tolist()
    params = SamplingParams(logit_bias={best: -100.0, 5: 0.5}, logprobs=1)
    requests = [make_request(SamplingParams()), make_request(params)]
    sampler = Sampler(VOCAB, "cpu")
    got = logits[[0, 0]].clone()
    sampler._changes.apply(got, make_sample_input(requests))
    expected = logits[[0, 0]].clone()
    expected[1, best] -= 100
    expected[1, 5] += 0.5
    torch.testing.assert_close(got, expected)
    sampled = sample(sampler, logits[[0, 0]], requests)
    assert sampled.token_ids == [best, second]
    entry = sampled.logprobs[1]  # of the model's own distribution
    assert entry is not None and entry.top[0][0] == best
    assert entry.logprob == pytest.approx(logits[0].log_softmax(-1)[second].item(), abs=1e-5)


def test_no_end_comes_before_the_least_number_of_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 9, 7]] = torch.tensor([30.0, 20.0, 10.0])
    sampler = Sampler(VOCAB, "cpu", eos_token_ids=(2,))
    params = SamplingParams(min_tokens=2, stop_token_ids=(9, 10_000))

    def draw(params: SamplingParams, output: tuple[int, ...]) -> int:
        return sample(sampler, logits, [make_request(params, output=output)]).token_ids[0]

    assert [draw(params, (5,) * n) for n in range(4)] == [7, 7, 2, 2]
    free = SamplingParams(min_tokens=2, stop_token_ids=(9,), ignore_eos=True)
    assert draw(free, ()) == 2  # it ends nothing
    drawn = SamplingParams(min_tokens=2, temperature=0.1, seed=1)
    assert (draw(drawn, ()), draw(drawn, (5, 5))) == (9, 2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {300: 1.0}}, "token id 300; expected 0 to 299"),
        ({"logit_bias": {-1: 1.0}}, "token id -1"),
        ({"logit_bias": {5: 101.0}}, "logit_bias of token 5 is 101.0; expected -100 to 100"),
        ({"logit_bias": {5: float("nan")}}, "nan"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "1025 tokens; expected at most 1024"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5; expected 0 to max_tokens"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 1, "json_schema": {}}, "form to follow"),
    ],
)
def test_a_bias_or_a_least_length_that_cannot_be_is_refused(
    params: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Sampler(VOCAB, "cpu").validate(SamplingParams(**params))


def test_a_penalty_keeps_greedy_output_from_repeating() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2], logits[0, 4] = 3.0, 2.9
    request = make_request(SamplingParams(frequency_penalty=1.0), output=(2,))

    assert sample(Sampler(5, "cpu"), logits, [request]).token_ids == [4]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = make_logits(3)
    batch = [
        SamplingParams(temperature=0.2, top_k=3, logprobs=2, repetition_penalty=2.0),
        SamplingParams(),
        SamplingParams(logprobs=0),
    ]
    requests = [make_request(p) for p in batch]
    sampled: Sampled = sample(Sampler(VOCAB, "cpu"), logits, requests)
    expected = logits.log_softmax(-1)

    for row in (0, 2):
        entry = sampled.logprobs[row]
        assert entry is not None
        assert entry.token_id == sampled.token_ids[row]
        assert entry.logprob == pytest.approx(expected[row, entry.token_id].item(), abs=1e-5)
    first, last = sampled.logprobs[0], sampled.logprobs[2]
    assert first is not None and last is not None
    assert [token for token, _ in first.top] == expected[0].topk(2).indices.tolist()
    assert last.top == ()


def test_rows_are_the_same_however_they_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(7)

    def draw() -> tuple[list[int], list[object]]:
        requests = [
            make_request(SamplingParams(temperature=1.0, seed=i, logprobs=1)) for i in range(7)
        ]
        sampled = sample(Sampler(VOCAB, "cpu"), logits, requests)
        return sampled.token_ids, list(sampled.logprobs)

    together = draw()
    monkeypatch.setattr(sampler_module, "_GROUP_LOGITS", 2 * VOCAB)
    assert draw() == together


def test_nan_logits_choose_a_token_of_the_vocabulary() -> None:
    logits = torch.full((1, VOCAB), torch.nan)
    request = make_request(SamplingParams(temperature=1.0))

    [token] = sample(Sampler(VOCAB, "cpu"), logits, [request]).token_ids
    assert 0 <= token < VOCAB


def test_release_forgets_a_request_and_may_be_repeated() -> None:
    params = SamplingParams(temperature=1.0, seed=1, presence_penalty=1.0)
    logits = torch.zeros(1, 10_000)
    sampler = Sampler(10_000, "cpu")
    request = make_request(params)
    first = sample(sampler, logits, [request]).token_ids
    sampler.release(request.sequence_id)
    sampler.release(request.sequence_id)

    assert sample(sampler, logits, [request]).token_ids == first
    sampler.release(request.sequence_id)
    assert not sampler._generators and not sampler._changes._counts


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="stop_token_ids"):
        Sampler(VOCAB, "cpu").validate(SamplingParams(stop=("x",)))


@pytest.mark.parametrize("vocab_size", [1, 5, 128, 300, 1024])
def test_a_token_is_that_of_the_running_sum(vocab_size: int) -> None:
    """The draw in two steps against one over all tokens, in float64, with most weights at 0."""
    generator = torch.Generator().manual_seed(vocab_size)
    weights = torch.rand(200, vocab_size, generator=generator)
    weights *= torch.rand(200, vocab_size, generator=generator) < 0.2
    weights[:, torch.randint(vocab_size, (1,), generator=generator)] = 0.5
    uniform = torch.rand(200, 1, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    sums = weights.double().cumsum(-1)
    expected = (sums <= uniform * sums[:, -1:]).sum(-1)
    found = _invert(weights, uniform)
    assert (weights.gather(1, found[:, None]) > 0).all()
    assert torch.equal(found[2:], expected[2:])
    assert found[0] == weights[0].nonzero()[0] and found[1] == weights[1].nonzero()[-1]
    _invert(torch.full((1, vocab_size), torch.nan), uniform[:1])  # whatever it is, it is a token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(logprobs=2, repetition_penalty=1.5),
    ],
    ids=["greedy", "drawn", "nucleus", "changed"],
)
def test_rows_without_a_largest_number_are_named_and_their_tokens_are_in_the_vocabulary(
    params: SamplingParams, dtype: torch.dtype
) -> None:
    logits = make_logits(6).to(dtype)
    logits[1] = torch.nan
    logits[2, 7] = torch.nan
    logits[3, 299] = torch.inf
    logits[4] = -torch.inf
    logits[5, 3] = -torch.inf  # a token that the model rules out is no fault
    requests = [make_request(params) for _ in range(6)]
    sampled = sample(Sampler(VOCAB, "cpu"), logits, requests)
    sound = sample(Sampler(VOCAB, "cpu"), logits[[0, 5]], [make_request(params) for _ in "ab"])

    assert sampled.not_finite == {requests[row].sequence_id for row in (1, 2, 3, 4)}
    assert all(0 <= token < VOCAB for token in sampled.token_ids)
    if params.temperature == 0 or params.seed is not None:
        assert [sampled.token_ids[row] for row in (0, 5)] == sound.token_ids
    assert not sound.not_finite


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_a_gpu_rows_without_a_largest_number_are_named_too(temperature: float) -> None:
    logits = make_logits(4).to("cuda", torch.bfloat16)
    logits[1] = torch.nan
    logits[2, 5] = torch.inf
    params = [SamplingParams(temperature=t) for t in (temperature, temperature, temperature, 0.0)]
    requests = [make_request(each) for each in params]
    sampled = sample(Sampler(VOCAB, "cuda"), logits, requests)
    assert sampled.not_finite == {requests[row].sequence_id for row in (1, 2)}
    assert all(0 <= token < VOCAB for token in sampled.token_ids)
    assert sampled.token_ids[3] == int(logits[3].argmax())
