"""The OpenAPI document, from the schemas the requests are checked by."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from hotset import __version__
from hotset.server.body import Json
from hotset.server.messages_error import is_messages_path
from hotset.server.schemas import ChatRequest, TextRequest

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request cannot be served as asked; `error.message` says why.",
    401: "The API key is missing or wrong.",
    403: "The server is asked for by a name that is not its own.",
    404: "There is no such model, response, file or batch.",
    408: "The body did not come.",
    409: "The state does not allow it.",
    413: "The body is too large.",
    429: "Too many requests, or a limit of the key; `Retry-After` says when to try again.",
    500: "The model step failed.",
    503: "Loading, shutting down, or failed.",
    504: "Not done within the time it had.",
}
_MESSAGES = "MessagesError"  # the shape of errors that the Messages API has
_MESSAGES_ERRORS = {**_ERRORS, 529: "Too many requests wait; try again later."}
_PARAMETERS: dict[str, Json] = {
    "file_id": {"type": "string", "pattern": "^file-[0-9a-f]{32}$"},
    "batch_id": {"type": "string", "pattern": "^batch-[0-9a-f]{32}$"},
    "response_id": {"type": "string", "pattern": "^resp_[0-9a-f]{32}$"},
    "model": {"type": "string", "minLength": 1},
}
JSON_ANSWER: Json = {"application/json": {"schema": {"type": "object"}}}
STREAMED: Json = {**JSON_ANSWER, "text/event-stream": {"schema": {"type": "string"}}}
PLAIN_TEXT: Json = {"text/plain": {"schema": {"type": "string"}}}
BYTES: Json = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@dataclass(frozen=True)
class Endpoint:
    """A route, and what the document says of it.

    Attributes:
        route: its method and path.
        summary: what it is for; without one it is not in the document.
        body: the schema its JSON body is checked by, or the content of another body.
        answer: the content of an answer.
    """

    method: str
    path: str
    handler: Any
    summary: str = ""
    tag: str = "generation"
    body: type[BaseModel] | Json | None = None
    answer: Json = field(default_factory=lambda: JSON_ANSWER)

    @property
    def route(self) -> Route:
        """For Starlette's router."""
        return Route(self.path, self.handler, methods=[self.method])


def document(endpoints: Iterable[Endpoint]) -> Json:
    """The whole document."""
    shown = [one for one in endpoints if one.summary]
    paths: Json = {}
    for one in shown:
        path = re.sub(r":\w+}", "}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = _operation(one)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hotset",
            "version": __version__,
            "description": "The OpenAI API, and Anthropic's for messages, over a model whose "
            "memory is tiered. A field that is not listed is refused, null is the same as absent.",
        },
        "paths": paths,
        "components": {
            "schemas": _schemas([one.body for one in shown if isinstance(one.body, type)]),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def _schemas(bodies: Iterable[type[BaseModel]]) -> Json:
    """The schemas of bodies, and of the two shapes of errors."""
    _, schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
    components: Json = schemas["$defs"]
    for request in (ChatRequest, TextRequest):
        components[request.__name__]["properties"] |= {
            name: {"enum": [*values, None], "description": "Taken where it asks for nothing."}
            for name, values in sorted(request.not_done.items())
        }
    text, maybe_text = {"type": "string"}, {"type": ["string", "null"]}
    of_error = {"message": text, "type": text, "param": maybe_text, "code": maybe_text}
    components["Error"] = object_of({"error": object_of(of_error)})
    error = object_of({"type": text, "message": text})
    components[_MESSAGES] = object_of({"type": {"const": "error"}, "error": error})
    components[_MESSAGES]["properties"]["request_id"] = text
    return components


def object_of(properties: Json) -> Json:
    """An object that has all of these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _operation(one: Endpoint) -> Json:
    errors, error = (
        (_MESSAGES_ERRORS, _MESSAGES) if is_messages_path(one.path) else (_ERRORS, "Error")
    )
    content = {"application/json": {"schema": {"$ref": _REF.format(model=error)}}}
    refusals = {
        str(code): {"description": text, "content": content} for code, text in errors.items()
    }
    operation: Json = {
        "summary": one.summary,
        "tags": [one.tag],
        "responses": {"200": {"description": "Done.", "content": one.answer}, **refusals},
    }
    if names := re.findall(r"{(\w+)", one.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _PARAMETERS[name]}
            for name in names
        ]
    if isinstance(one.body, type):
        schema = {"$ref": _REF.format(model=one.body.__name__)}
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    elif one.body:
        operation["requestBody"] = {"required": True, "content": one.body}
    return operation
