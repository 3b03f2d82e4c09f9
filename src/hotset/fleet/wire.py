"""What goes over a link between a front and a replica: msgpack, of known types only.

Nothing that is read here runs code. The messages of `engine.messages` go as they are: dataclasses
as maps, so that a field with a default may be missing on either side, and named tuples as lists.

Imports no torch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from hotset.engine.messages import EngineInfo, Report, Submit
from hotset.errors import (
    ConfigError,
    DrainingError,
    EngineError,
    HotsetError,
    OverloadedError,
    RequestError,
)
from hotset.metrics import Metrics
from hotset.options import OPTIONS, Options

T = TypeVar("T")

# The newest first; a side speaks the current one and the one before it.
VERSIONS = (1,)
# What a frame may have at most, in bytes: a tokenizer takes up to 40 MB.
MOST_BYTES = 2**26
# The same before both sides have told which versions they speak.
MOST_HELLO_BYTES = 2**16


class WireError(Exception):
    """Bytes that are no message; one line."""


class Hello(msgspec.Struct, omit_defaults=True):
    """A front's first message.

    Attributes:
        versions: that the front speaks.
        tokenizers: digests of those that it has.
    """

    versions: list[int]
    tokenizers: list[str] = []


class TokenizerData(msgspec.Struct, omit_defaults=True):
    """A tokenizer as data.

    Attributes:
        backend: the JSON of the tokenizers library.
        chat_template: Jinja; by name where there are several.
        special_tokens: text by name, such as `bos_token`.
    """

    backend: str
    chat_template: str | dict[str, str] | None
    special_tokens: dict[str, str]
    model_max_length: int


class ModelData(msgspec.Struct, omit_defaults=True):
    """What a front needs of a `LoadedModel`.

    Attributes:
        tokenizer_digest: None where the model has no tokenizer.
        tokenizer: None, too, where the front has it.
    """

    name: str
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    notes: tuple[str, ...] = ()
    tokenizer_digest: str | None = None
    tokenizer: TokenizerData | None = None


class Welcome(msgspec.Struct, tag="welcome", omit_defaults=True):
    """A replica's answer to a `Hello`; messages of that version follow.

    Attributes:
        info: of an `EngineInfo`; see `info_data`.
    """

    version: int
    replica_id: str
    model: ModelData
    info: dict[str, Any]


class Refused(msgspec.Struct, tag="refused"):
    """The other answer: one line; nothing follows."""

    reason: str


class Submitted(msgspec.Struct, tag="submit", omit_defaults=True):
    """A submit; its answer has the same number.

    Attributes:
        submit: a `Submit`, encoded on its own, so that one that cannot be read is refused alone.
        is_json: it has a number beyond 64 bits, such as a seed, which msgpack does not take.
    """

    number: int
    submit: bytes
    is_json: bool = False


class Abort(msgspec.Struct, tag="abort"):
    """See `EngineHost.abort`."""

    request_id: str


class Look(msgspec.Struct, tag="look"):
    """See `EngineHost.look`."""

    look_id: int


class Drain(msgspec.Struct, tag="drain"):
    """See `EngineHost.drain`."""

    drain_s: float


class Follow(msgspec.Struct, tag="follow"):
    """See `EngineHost.follow`."""

    is_on: bool


FrontMessage = Submitted | Abort | Look | Drain | Follow


class Refusal(msgspec.Struct, omit_defaults=True):
    """An error that a submit raised at the replica."""

    kind: str
    message: str
    param: str | None = None
    code: str = "invalid_value"
    retry_after_s: int = 0


class Answer(msgspec.Struct, omit_defaults=True):
    """The answer to the submit of that number."""

    number: int
    refusal: Refusal | None = None


class Batch(msgspec.Struct, omit_defaults=True):
    """All that a replica has for a front by now.

    Attributes:
        metrics: the engine's counters, where they are due.
    """

    reports: list[Report] = []
    answers: list[Answer] = []
    metrics: Metrics | None = None


def _made(kind: Any, value: Any) -> Any:
    """What msgspec does not make itself."""
    if getattr(kind, "__origin__", kind) is Counter:
        return Counter(value)
    raise NotImplementedError(kind)


_encoder = msgspec.msgpack.Encoder()
_hello = msgspec.msgpack.Decoder(Hello)
_greeting = msgspec.msgpack.Decoder(Welcome | Refused)
_front_message: msgspec.msgpack.Decoder[FrontMessage] = msgspec.msgpack.Decoder(FrontMessage)
_submit = msgspec.msgpack.Decoder(Submit)
_json_submit = msgspec.json.Decoder(Submit)
_batch = msgspec.msgpack.Decoder(Batch, dec_hook=_made)
_DEFAULTS = {one.name: one.default for one in fields(EngineInfo)}
# The options are flat.
_info = msgspec.defstruct(
    "_Info",
    [
        (name, kind) if (default := _DEFAULTS[name]) is MISSING else (name, kind, default)
        for name, kind in get_type_hints(EngineInfo).items()
        if kind is not Options
    ],
)


def encode(message: Hello | Welcome | Refused | FrontMessage | Batch) -> bytes:
    """A message as the bytes of a frame."""
    return _encoder.encode(message)


def _read(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, HotsetError, RecursionError) as error:
        raise WireError(" ".join(str(error).split())) from None


def read_hello(data: bytes) -> Hello:
    """Raises WireError."""
    return _read(_hello, data)


def read_greeting(data: bytes) -> Welcome | Refused:
    """Raises WireError."""
    return _read(_greeting, data)


def read_front_message(data: bytes) -> FrontMessage:
    """Raises WireError."""
    return _read(_front_message, data)


def read_batch(data: bytes) -> Batch:
    """Raises WireError."""
    return _read(_batch, data)


def submitted(number: int, submit: Submit) -> Submitted:
    """Raises RequestError where the request has a text that is none."""
    plain = replace(submit, token_ids=list(submit.token_ids))
    try:
        try:
            return Submitted(number, _encoder.encode(plain))
        except OverflowError:
            return Submitted(number, msgspec.json.encode(plain), is_json=True)
    except UnicodeEncodeError:
        raise RequestError(
            "the request has a text with half a surrogate pair, which is no character; leave it out"
        ) from None


def read_submit(message: Submitted) -> Submit:
    """Raises RequestError where it is none, or is one that cannot be served."""
    decoder = _json_submit if message.is_json else _submit
    try:
        return decoder.decode(message.submit)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"the request cannot be read: {error}") from None


_KINDS: dict[str, type[HotsetError]] = {
    kind.__name__: kind for kind in (ConfigError, DrainingError, EngineError, HotsetError)
}


def refusal_of(error: Exception) -> Refusal:
    """An error as data."""
    message = printable(" ".join(str(error).split()))
    if isinstance(error, RequestError):
        return Refusal("RequestError", message, error.param, error.code)
    if isinstance(error, OverloadedError):
        return Refusal("OverloadedError", message, retry_after_s=error.retry_after_s)
    if isinstance(error, HotsetError):
        return Refusal(type(error).__name__, message)
    return Refusal("EngineError", f"the request could not be queued: {message}")


def error_of(refusal: Refusal) -> HotsetError:
    """The error that it was; an EngineError where its kind is not known here."""
    if refusal.kind == "RequestError":
        return RequestError(refusal.message, param=refusal.param, code=refusal.code)
    if refusal.kind == "OverloadedError":
        return OverloadedError(refusal.message, refusal.retry_after_s)
    return _KINDS.get(refusal.kind, EngineError)(refusal.message)


def printable(text: str) -> str:
    """A text that can be encoded, whatever a client has sent."""
    return text.encode(errors="replace").decode()


def info_data(info: EngineInfo) -> dict[str, Any]:
    """An `EngineInfo` as a map, its options flat."""
    data = {one.name: getattr(info, one.name) for one in fields(info)}
    options = info.options.flat()
    data["options"] = {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items()
    }
    return data


def read_info(data: dict[str, Any]) -> EngineInfo:
    """The `EngineInfo` of a map; options that are not known here are left out.

    Raises:
        WireError: it is none.
    """
    rest = dict(data)
    given = rest.pop("options", None)
    try:
        if not isinstance(given, dict):
            raise WireError("options are missing")
        options = Options.of(**{name: given[name] for name in given if name in OPTIONS})
        read = msgspec.convert(rest, _info)
    except (msgspec.ValidationError, HotsetError, TypeError) as error:
        raise WireError(f"the engine's description cannot be read: {error}") from None
    return EngineInfo(options, **msgspec.structs.asdict(read))


def agree(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The newest version that both sides speak."""
    return max(set(ours) & set(theirs), default=None)
