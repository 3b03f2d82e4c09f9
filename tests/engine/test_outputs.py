from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import EOS_TOKEN_ID, make_backend
from tokenizers import Tokenizer, decoders, models

from hotset.engine.outputs import OutputProcessor
from hotset.errors import ModelError
from hotset.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from hotset.sequence import Request

TOKENIZER = make_backend()


def make_outputs(tokenizer: Tokenizer | None = TOKENIZER) -> OutputProcessor:
    wrapped = None if tokenizer is None else SimpleNamespace(backend_tokenizer=tokenizer)
    return OutputProcessor(wrapped, (EOS_TOKEN_ID,))


def make_request(
    params: SamplingParams | None = None,
    *,
    prompt: list[int] | None = None,
    name: str = "r",
    index: int = 0,
) -> Request:
    prompt = TOKENIZER.encode("The cat").ids if prompt is None else prompt
    params = params or SamplingParams()
    limit = len(prompt) + (params.max_tokens or 1000)
    return Request(name, len(prompt), list(prompt), params, limit, index)


def feed(outputs: OutputProcessor, request: Request, token_ids: list[int]) -> list[RequestOutput]:
    """Append tokens one a step, as the engine does, until the request has ended."""
    taken = []
    for token_id in token_ids:
        request.token_ids.append(token_id)
        reason = outputs.append(request, token_id, None)
        [output] = outputs.take()
        assert output.finish_reason is reason
        taken.append(output)
        if reason is not None:
            break
    return taken


def run(text: str, params: SamplingParams, *, end: bool = True) -> list[RequestOutput]:
    outputs = make_outputs()
    request = make_request(params)
    outputs.add(request)
    return feed(outputs, request, TOKENIZER.encode(text).ids + [EOS_TOKEN_ID] * end)


def joined(taken: list[RequestOutput]) -> str:
    return "".join(output.text for output in taken)


@pytest.mark.parametrize("text", ["the cat sat.", " naïve 日本 🙂🙂 end", "🏳️‍🌈", " ", "\n\n"])
def test_streamed_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    taken = run(text, SamplingParams(max_tokens=None))

    assert joined(taken) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in output.text for output in taken)
    assert taken[-1].finish_reason is FinishReason.STOP
    assert taken[-1].token_ids == (EOS_TOKEN_ID,)


def test_a_character_cut_by_max_tokens_ends_as_the_tokenizer_decodes_it() -> None:
    ids = TOKENIZER.encode("a 日").ids
    taken = run("a 日", SamplingParams(max_tokens=len(ids) - 1))

    assert taken[-1].finish_reason is FinishReason.LENGTH
    assert joined(taken) == TOKENIZER.decode(ids[:-1])


def test_the_end_of_sequence_token_ends_unless_it_is_ignored() -> None:
    ids = [*TOKENIZER.encode("the").ids, EOS_TOKEN_ID, *TOKENIZER.encode(" cat").ids]
    for ignore, text in ((False, "the"), (True, "the cat")):
        outputs = make_outputs()
        request = make_request(SamplingParams(ignore_eos=ignore, max_tokens=len(ids)))
        outputs.add(request)
        taken = feed(outputs, request, ids)
        assert joined(taken) == text
        reason = FinishReason.LENGTH if ignore else FinishReason.STOP
        assert taken[-1].finish_reason is reason


def test_a_stop_token_id_ends_and_is_not_in_the_text() -> None:
    stop = TOKENIZER.encode(".").ids
    taken = run("the cat. the dog.", SamplingParams(stop_token_ids=tuple(stop)))

    assert joined(taken) == "the cat"
    assert taken[-1].token_ids == tuple(stop)


def test_the_first_space_of_an_output_is_kept_by_a_decoder_that_strips_it() -> None:
    tokenizer = Tokenizer(models.WordLevel({"\u2581Hello": 0, "\u2581world": 1}, unk_token=None))
    tokenizer.decoder = decoders.Metaspace()
    outputs = OutputProcessor(SimpleNamespace(backend_tokenizer=tokenizer), ())
    request = make_request(SamplingParams(max_tokens=1), prompt=[0])
    outputs.add(request)

    assert joined(feed(outputs, request, [1])) == " world"


def test_a_prompt_that_ends_within_a_character_is_not_repeated_in_the_output() -> None:
    for prompt in (TOKENIZER.encode("a 日").ids[:-1], TOKENIZER.encode("a \ufffd").ids):
        outputs = make_outputs()
        request = make_request(SamplingParams(max_tokens=1), prompt=prompt)
        outputs.add(request)
        assert joined(feed(outputs, request, TOKENIZER.encode(" cat").ids[:1])).startswith(" c")


def test_text_that_may_become_a_stop_string_is_held_back_and_released() -> None:
    taken = run("one END two", SamplingParams(stop=("ENDING",)))
    sent = ""
    for output in taken[:-1]:
        sent += output.text
        assert not sent.endswith(("E", "EN", "END"))
    assert joined(taken) == "one END two"


@given(
    st.text(alphabet="ab日", max_size=14),
    st.lists(st.text(alphabet="ab日", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_output_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    # The tokens of this alphabet are single characters or parts of them.
    expected, reason = text, FinishReason.STOP
    for end in range(len(text) + 1):
        starts = [at for at in (text[:end].find(s) for s in stop) if at >= 0]
        if starts:
            expected = text[: min(starts)]
            break
    taken = run(text, SamplingParams(stop=tuple(stop)))

    assert joined(taken) == expected
    assert taken[-1].finish_reason is reason


def test_a_stop_string_over_several_tokens_is_cut_at_its_start() -> None:
    taken = run("the dog sat by the door", SamplingParams(stop=("sat by", "door")))

    assert joined(taken) == "the dog "
    assert taken[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("stop", "text"), [((" sat", " s"), "The cat s"), ((" sat",), "The cat sat")]
)
def test_a_stop_string_may_be_part_of_the_text(stop: tuple[str, ...], text: str) -> None:
    taken = run("The cat sat down", SamplingParams(stop=stop, include_stop_str_in_output=True))
    assert joined(taken) == text and taken[-1].finish_reason is FinishReason.STOP


def test_a_stop_token_may_be_part_of_the_text() -> None:
    stop = TOKENIZER.encode("a cat").ids[-1]
    params = SamplingParams(stop_token_ids=(stop,), include_stop_str_in_output=True)
    assert joined(run("a cat sat", params)) == "a cat"
    for skip, text in ((True, "cat"), (False, "cat<eos>")):
        params = SamplingParams(include_stop_str_in_output=True, skip_special_tokens=skip)
        assert joined(run("cat", params)) == text
        assert joined(run("cat", SamplingParams(skip_special_tokens=skip))) == "cat"


def test_special_tokens_are_part_of_the_text_where_that_is_asked_for() -> None:
    assert joined(run("a<user>b", SamplingParams())) == "ab"
    assert joined(run("a<user>b", SamplingParams(skip_special_tokens=False))) == "a<user>b"


def test_a_stop_string_is_looked_for_after_the_least_number_of_tokens() -> None:
    ids = TOKENIZER.encode("a b a b").ids
    first = len(TOKENIZER.encode("a b").ids)
    params = SamplingParams(stop=("b",), min_tokens=first)
    assert joined(run("a b a b", params)) == "a b a "
    assert joined(run("a b a b", SamplingParams(stop=("b",), min_tokens=first - 1))) == "a "
    assert joined(run("a b a b", SamplingParams(stop=("b",), min_tokens=len(ids)))) == "a b a b"


def test_a_stop_string_wins_over_max_tokens_at_the_same_token() -> None:
    ids = TOKENIZER.encode("the dog sat").ids
    taken = run("the dog sat", SamplingParams(stop=(" sat",), max_tokens=len(ids)))

    assert taken[-1].finish_reason is FinishReason.STOP
    assert joined(taken) == "the dog"


def test_an_abort_releases_the_text_held_back_and_ends_once() -> None:
    outputs = make_outputs()
    request = make_request(SamplingParams(stop=("sat by",)))
    outputs.add(request)
    feed(outputs, request, TOKENIZER.encode("the dog sat").ids)
    outputs.finish(request, FinishReason.ABORT)
    outputs.finish(request, FinishReason.ERROR, "late")
    outputs.finish(make_request(name="unknown"), FinishReason.ABORT)

    [output] = outputs.take()
    assert (output.text, output.finish_reason, output.error) == ("sat", FinishReason.ABORT, None)
    assert not outputs.has_outputs
    assert outputs.take() == []


def test_an_error_carries_its_line() -> None:
    outputs = make_outputs()
    request = make_request()
    outputs.add(request)
    outputs.finish(request, FinishReason.ERROR, "no memory")

    [output] = outputs.take()
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "no memory")


def test_outputs_of_one_request_carry_its_id_and_their_index() -> None:
    outputs = make_outputs()
    ids = (("a", 0), ("a", 1), ("b", 10))
    requests = [make_request(name=name, index=index) for name, index in ids]
    for request in requests:
        outputs.add(request)
        request.token_ids.append(10)
        outputs.append(request, 10, TokenLogprob(10, -0.5))

    taken = outputs.take()
    assert [(o.request_id, o.index) for o in taken] == list(ids)
    assert taken[0].logprobs == (TokenLogprob(10, -0.5),)
    assert taken[0].prompt_tokens == requests[0].prompt_len


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    outputs = make_outputs(None)
    request = make_request(SamplingParams(max_tokens=2))
    outputs.add(request)
    taken = feed(outputs, request, [7, 8])

    assert joined(taken) == ""
    assert [output.token_ids for output in taken] == [(7,), (8,)]
    assert taken[-1].finish_reason is FinishReason.LENGTH


def test_a_tokenizer_that_cannot_decode_incrementally_is_refused() -> None:
    with pytest.raises(ModelError, match="expected a fast one"):
        OutputProcessor(SimpleNamespace(), ())
