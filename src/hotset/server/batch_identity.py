"""What an answer of a batch belongs to: its request, its model, and the options behind it.

Each record of an output carries this in its `id`, so that a later run sees whether it would
give the answers that are already there. There is no second file to lose.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from hotset.foreign_text import ForeignTextError, parse_json
from hotset.options import OPTIONS, Options

if TYPE_CHECKING:
    from hotset.model.loaded import LoadedModel

_ID = re.compile(r"batch_req_(\d+)_([0-9a-f]{16})_([0-9a-f]{8})_([0-9a-f]{8})_([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What all answers of one run share.

    Attributes:
        model: hash of the checkpoint's config and weights, 8 hex digits.
        options: hash of the options that change answers, likewise.
        texts: hash of the chat template, the tokenizer and the end tokens, likewise; None before
            the model is loaded.
    """

    model: str
    options: str
    texts: str | None = None

    @classmethod
    def of(cls, fingerprint: str, options: Options, extra: object = None) -> Self:
        """The identity of an engine's run.

        Args:
            fingerprint: of the checkpoint, as `LoadedModel` has it.
            options: only values other than the defaults count.
            extra: other things that change answers; plain data.
        """
        # With dtype auto it decides on the dtype.
        left_out = set() if options.model.dtype == "auto" else {"device"}
        changed = {
            name: value
            for name, value in options.flat().items()
            if name not in left_out
            and not OPTIONS[name].keeps_answers
            and value != OPTIONS[name].default
        }
        return cls(_digest(fingerprint, 8), _digest(repr([sorted(changed.items()), extra]), 8))

    @classmethod
    def of_model(cls, model: "LoadedModel", options: Options, extra: object = None) -> Self:
        """The same of a loaded model, with what makes its texts tokens and its tokens texts."""
        template = getattr(model.tokenizer, "chat_template", None)
        backend = getattr(model.tokenizer, "backend_tokenizer", None)
        tokenizer = {} if backend is None else parse_json(backend.to_str())
        for of_a_call in ("truncation", "padding"):
            tokenizer.pop(of_a_call, None)
        texts = json.dumps([template, tokenizer, sorted(model.eos_token_ids)], sort_keys=True)
        found = cls.of(model.fingerprint, options, extra)
        return dataclasses.replace(found, texts=_digest(texts, 8))

    def record_id(self, position: int, line: bytes) -> str:
        """The id of the record that answers `line`, the input's line at `position`."""
        assert self.texts is not None, "the model is not loaded"
        line_hash = line_identity(line)
        return f"batch_req_{position}_{line_hash}_{self.model}_{self.options}_{self.texts}"


def line_identity(line: bytes) -> str:
    """A hash of the values of an input's line: spaces do not count.

    The order of its fields and of its body's fields does not count either. Further down the order
    counts: a model reads tools and writes the properties of a schema in the order given.
    """
    try:
        content = parse_json(line)
    except ForeignTextError:
        return _digest(line.strip(), 16)
    if isinstance(content, dict):
        content = _sorted(content)
        if isinstance(content.get("body"), dict):
            content["body"] = _sorted(content["body"])
    return _digest(json.dumps(content), 16)


def _sorted(fields: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(fields.items()))


def read_record_id(record_id: object) -> tuple[int, str, RunIdentity] | None:
    """The position, the line's identity and the run's; None where it is no id of ours."""
    match = _ID.fullmatch(record_id) if isinstance(record_id, str) else None
    if match is None:
        return None
    return int(match[1]), match[2], RunIdentity(match[3], match[4], match[5])


def _digest(content: str | bytes, num_digits: int) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=num_digits // 2).hexdigest()
