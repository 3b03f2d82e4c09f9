"""What a streamed completion said, read from its bytes after the run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from hotset.bench.http_stream import RawAnswer
from hotset.foreign_text import ForeignTextError, parse_json

_IDS = re.compile(rb'"token_ids":\s*\[([\d,\s]*)\]')


@dataclass(slots=True)
class Reading:
    """A completion as its events tell it. Times are as in the answer.

    Attributes:
        outputs: when something of the answer came, and the ids in it, where there are some.
        num_tokens: as the server counts them; None where it does not say.
        error: what went wrong, in one line.
        has_ended: whether its last event or a reason to finish has come.
    """

    outputs: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)
    num_tokens: int | None = None
    error: str | None = None
    has_ended: bool = False


def read_answer(answer: RawAnswer) -> Reading:
    """Read an answer that has come to its end."""
    reading = Reading()
    if answer.status != 200:
        text = answer.body.decode("utf-8", "replace")
        reading.error = f"HTTP {answer.status}: {' '.join(text.split())[:300]}"
        return reading
    for time_s, line in _lines(answer.chunks):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            reading.has_ended = True
            continue
        try:
            event = parse_json(data)
            _take(event, time_s, reading)
        except (ForeignTextError, AttributeError, TypeError, ValueError) as error:
            reading.error = f"an event cannot be read: {error}"
        if reading.error is not None:
            return reading
    if not reading.has_ended:
        reading.error = "the stream ended without its last event"
    return reading


def ids_of(body: bytes) -> list[int]:
    """The token ids in an answer's body, found without parsing its events, which takes longer."""
    return [
        int(token_id)
        for found in _IDS.findall(body)
        for token_id in found.split(b",")
        if token_id.strip()
    ]


def _take(event: dict[str, object], time_s: float, reading: Reading) -> None:
    if error := event.get("error"):
        told = error.get("message") if isinstance(error, dict) else error
        reading.error = " ".join(str(told).split())
        return
    usage = event.get("usage")
    if isinstance(usage, dict) and usage.get("completion_tokens") is not None:
        reading.num_tokens = int(usage["completion_tokens"])
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        ids = tuple(map(int, choice.get("token_ids") or ()))
        reading.has_ended |= choice.get("finish_reason") is not None
        if choice.get("text") or ids:
            reading.outputs.append((time_s, ids))


def _lines(chunks: Iterable[tuple[float, bytes]]) -> Iterable[tuple[float, bytes]]:
    """Each line, with the time at which its end came."""
    rest = b""
    time_s = 0.0
    for time_s, chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield time_s, line.rstrip(b"\r")
    if rest:
        yield time_s, rest
