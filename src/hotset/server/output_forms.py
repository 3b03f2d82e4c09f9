"""What form an output must have, as vLLM lets clients say it beside `response_format`."""

import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hotset.errors import RequestError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.request import TextForm
from hotset.server.not_done import without_not_done

# A JSON schema, or another form.
OutputForm = dict[str, Any] | TextForm
_NOT_DONE = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`: one of these."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_is_not_done(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return without_not_done(data, _NOT_DONE, within="structured_outputs.")

    @model_validator(mode="after")
    def _asks_for_a_form(self) -> Self:
        if not self.asked():
            raise RequestError(
                "structured_outputs asks for no form; expected json, json_object, regex, choice or "
                "grammar in it",
                param="structured_outputs",
            )
        return self

    def asked(self) -> dict[str, Any]:
        """What is asked for, by field."""
        fields = {
            "json": self.json_,
            "json_object": {"type": "object"} if self.json_object else None,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        return {
            f"structured_outputs.{name}": value
            for name, value in fields.items()
            if value is not None
        }


class FormFields(BaseModel):
    """The fields of a request by which vLLM has forms, older names included."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def asked_forms(self) -> dict[str, OutputForm]:
        """The forms asked for, by field. Raises RequestError where one cannot be read."""
        given: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        }
        if self.structured_outputs is not None:
            given |= self.structured_outputs.asked()
        return {name: _form(name, value) for name, value in given.items() if value is not None}


def _form(name: str, value: Any) -> OutputForm:
    kind = name.removeprefix("structured_outputs.").removeprefix("guided_")
    if kind == "regex":
        return TextForm("regex", value)
    if kind == "grammar":
        return TextForm("grammar", value)
    if kind == "choice":
        if not value or not all(value):
            raise RequestError(f"{name} has no texts; expected one or more, none empty", param=name)
        return TextForm("choice", json.dumps(value))
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ForeignTextError as error:
            raise RequestError(f"{name} {error}; expected a JSON schema", param=name) from error
    if not isinstance(value, dict):
        raise RequestError(
            f"{name} is a JSON {type(value).__name__}; expected an object", param=name
        )
    return value
