"""A model's tokenizer as data, so that a front needs no checkpoint and runs no code of others.

Imports no torch.
"""

import hashlib
import threading
from typing import Any

from hotset.errors import ModelError
from hotset.fleet.wire import ModelData, TokenizerData
from hotset.model.loaded import LoadedModel

_known: dict[str, Any] = {}  # tokenizers of this process by digest; guarded by _lock
_lock = threading.Lock()


def model_data(model: LoadedModel) -> ModelData:
    """What fronts need of a model, its tokenizer included.

    Raises:
        ModelError: the tokenizer is of a kind that is more than data.
    """
    tokenizer = None if model.tokenizer is None else _tokenizer_data(model)
    return ModelData(
        model.name,
        model.fingerprint,
        model.eos_token_ids,
        model.max_model_len,
        model.notes,
        None if tokenizer is None else _digest(tokenizer),
        tokenizer,
    )


def loaded_model(data: ModelData) -> LoadedModel:
    """The model as a front knows it: no weights, and a tokenizer that others may have too.

    Raises:
        ModelError: the tokenizer is missing or cannot be made.
    """
    return LoadedModel(
        None,
        None if data.tokenizer_digest is None else _tokenizer(data),
        data.name,
        data.fingerprint,
        data.eos_token_ids,
        data.max_model_len,
        notes=data.notes,
    )


def known_tokenizers() -> list[str]:
    """Digests of the tokenizers that this process has made."""
    with _lock:
        return list(_known)


def _tokenizer_data(model: LoadedModel) -> TokenizerData:
    from transformers import PreTrainedTokenizerBase

    tokenizer = model.tokenizer
    render = getattr(type(tokenizer), "apply_chat_template", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        tokenizer is None
        or backend is None
        or (render is not PreTrainedTokenizerBase.apply_chat_template)
    ):
        raise ModelError(
            f"the tokenizer of {model.name!r} is a {type(tokenizer).__name__}, which is more than "
            "data, so that a replica cannot give it to its fronts; use hotset serve"
        )
    return TokenizerData(
        backend.to_str(),
        tokenizer.chat_template,
        {name: str(text) for name, text in tokenizer.special_tokens_map.items()},
        # transformers has 1e30 for none.
        min(int(tokenizer.model_max_length), 2**62),
    )


def _digest(data: TokenizerData) -> str:
    parts = repr((data.chat_template, sorted(data.special_tokens.items()), data.model_max_length))
    return hashlib.blake2b(f"{parts}\0{data.backend}".encode(), digest_size=16).hexdigest()


def _tokenizer(data: ModelData) -> Any:
    digest = data.tokenizer_digest
    assert digest is not None
    with _lock:  # one thread makes it, and the others wait
        if digest not in _known:
            if data.tokenizer is None or _digest(data.tokenizer) != digest:
                raise ModelError(f"the tokenizer of {data.name!r} did not come")
            try:
                _known[digest] = _make(data.tokenizer)
            except Exception as error:  # the tokenizers library raises Exception
                raise ModelError(
                    f"the tokenizer of {data.name!r} cannot be made: {error}"
                ) from None
        return _known[digest]


def _make(data: TokenizerData) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(data.backend),
        chat_template=data.chat_template,
        model_max_length=data.model_max_length,
        **data.special_tokens,
    )
