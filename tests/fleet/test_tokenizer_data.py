import pytest
from tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer

from hotset.errors import ModelError
from hotset.fleet import tokenizer_data
from hotset.fleet.tokenizer_data import known_tokenizers, loaded_model, model_data
from hotset.fleet.wire import ModelData
from hotset.model.loaded import LoadedModel


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_data, "_known", {})


def model(tokenizer: object) -> LoadedModel:
    return LoadedModel(object(), tokenizer, "tiny", "f" * 32, (2,), 512, ((1.0, 2.0),), ("note",))


def test_a_front_has_the_tokenizer_of_the_replica() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tools": "{{ bos_token }}"}
    got = loaded_model(model_data(model(tokenizer)))
    assert (got.model, got.name, got.eos_token_ids, got.notes) == (None, "tiny", (2,), ("note",))
    copy = got.require_tokenizer()
    assert copy.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert copy.chat_template == tokenizer.chat_template
    assert copy.special_tokens_map == tokenizer.special_tokens_map
    assert copy.model_max_length >= 2**62
    chat = [{"role": "user", "content": "the cat <eos>"}]
    for one in ("default", "tools"):
        options = {"tokenize": False, "chat_template": one, "add_generation_prompt": True}
        assert copy.apply_chat_template(chat, **options) == tokenizer.apply_chat_template(
            chat, **options
        )


def test_a_tokenizer_is_sent_and_made_once() -> None:
    data = model_data(model(make_tokenizer()))
    first = loaded_model(data).tokenizer
    assert known_tokenizers() == [data.tokenizer_digest]
    data.tokenizer = None  # as a replica sends it to who knows it
    assert loaded_model(data).tokenizer is first


def test_a_tokenizer_that_is_not_what_its_digest_says_is_refused() -> None:
    data = model_data(model(make_tokenizer()))
    assert data.tokenizer is not None
    data.tokenizer.chat_template = "another"
    with pytest.raises(ModelError, match="did not come"):
        loaded_model(data)
    assert not known_tokenizers()


def test_a_tokenizer_that_cannot_be_made_is_one_line() -> None:
    data = model_data(model(make_tokenizer()))
    assert data.tokenizer is not None
    data.tokenizer.backend = "{}"
    data.tokenizer_digest = tokenizer_data._digest(data.tokenizer)
    with pytest.raises(ModelError, match="the tokenizer of 'tiny' cannot be made: "):
        loaded_model(data)


def test_a_tokenizer_that_is_more_than_data_is_refused_by_name() -> None:
    class OfAModel(type(make_tokenizer())):  # type: ignore[misc]
        def apply_chat_template(self, *args: object, **options: object) -> str:
            return ""

    with pytest.raises(ModelError, match="is a OfAModel, which is more than data"):
        model_data(model(OfAModel(tokenizer_object=make_tokenizer().backend_tokenizer)))
    with pytest.raises(ModelError, match="is a str, which is more than data"):
        model_data(model("slow"))


def test_a_model_without_a_tokenizer_has_none_at_the_front() -> None:
    data = model_data(model(None))
    assert data == ModelData("tiny", "f" * 32, (2,), 512, ("note",))
    assert loaded_model(data).tokenizer is None
