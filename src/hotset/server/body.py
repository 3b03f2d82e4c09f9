"""JSON objects of requests, and how they are checked."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from hotset.errors import RequestError
from hotset.server.validation import explain, shown

Json = dict[str, Any]
Body = TypeVar("Body", bound="Part")


class Part(BaseModel):
    """A JSON object of a request. Unknown fields are refused; null is the same as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


def parse_body(kind: type[Body], data: object) -> Body:
    """Check the JSON body of a request; raises RequestError with one line."""
    if not isinstance(data, dict):
        raise RequestError(f"the body is {shown(data)}; expected an object", code="invalid_type")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise explain(error, data) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply", code="invalid_json") from error
