"""The OpenAPI document, from the schemas the requests are checked by."""

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hotset import __version__
from hotset.server.body import Json
from hotset.server.messages_body import CountTokensRequest, MessagesRequest
from hotset.server.responses_body import ResponsesRequest
from hotset.server.schemas import (
    BatchRequest,
    ChatRequest,
    DetokenizeRequest,
    TextRequest,
    TokenizeRequest,
)

_BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    TextRequest,
    TokenizeRequest,
    DetokenizeRequest,
    BatchRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
)
_REF = "#/components/schemas/{model}"
_OBJECT: Json = {"type": "object"}
_TEXT: Json = {"text/plain": {"schema": {"type": "string"}}}
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
_FILE_ID: Json = {
    "name": "file_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^file-[0-9a-f]{32}$"},
}
_BATCH_ID: Json = {**_FILE_ID, "name": "batch_id"}
_BATCH_ID["schema"] = {"type": "string", "pattern": "^batch-[0-9a-f]{32}$"}
_RESPONSE_ID: Json = {**_FILE_ID, "name": "response_id"}
_RESPONSE_ID["schema"] = {"type": "string", "pattern": "^resp_[0-9a-f]{32}$"}
_MODEL_ID: Json = {**_FILE_ID, "name": "model", "schema": {"type": "string", "minLength": 1}}


def document() -> Json:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hotset",
            "version": __version__,
            "description": "The OpenAI API, and Anthropic's for messages, over a model whose "
            "memory is tiered. A field that is not listed is refused, null is the same as absent.",
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"key": []}, {"x-api-key": []}, {}],
    }


def _schemas() -> Json:
    """The schemas of bodies, and of the two shapes of errors."""
    _, schemas = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REF)
    components: Json = schemas["$defs"]
    for request in (ChatRequest, TextRequest):
        components[request.__name__]["properties"] |= {
            name: {"enum": [*values, None], "description": "Taken where it asks for nothing."}
            for name, values in sorted(request.not_done.items())
        }
    text, maybe_text = {"type": "string"}, {"type": ["string", "null"]}
    of_error = {"message": text, "type": text, "param": maybe_text, "code": maybe_text}
    components["Error"] = _object({"error": _object(of_error)})
    error = _object({"type": text, "message": text})
    components[_MESSAGES] = _object({"type": {"const": "error"}, "error": error})
    components[_MESSAGES]["properties"]["request_id"] = text
    return components


def _object(properties: Json) -> Json:
    """An object that has all of these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _paths() -> Json:
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    lines = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    file: Json = {"type": "string", "format": "binary"}
    purpose: Json = {"type": "string", "enum": ["batch"]}
    upload = {"multipart/form-data": {"schema": _object({"file": file, "purpose": purpose})}}
    post, get = _post, _get
    return {
        "/v1/chat/completions": {"post": post("Answer a chat", ChatRequest, extra=stream)},
        "/v1/completions": {"post": post("Continue a text", TextRequest, extra=stream)},
        "/v1/responses": {"post": post("Make a response", ResponsesRequest, extra=stream)},
        "/v1/responses/{response_id}": {
            "get": get("A response that was stored", "generation", [_RESPONSE_ID]),
            "delete": _operation("Forget a response", "generation", [_RESPONSE_ID]),
        },
        "/v1/messages": {
            "post": post("Answer a message", MessagesRequest, extra=stream, error=_MESSAGES)
        },
        "/v1/messages/count_tokens": {
            "post": post("Count a prompt's tokens", CountTokensRequest, error=_MESSAGES)
        },
        "/v1/models": {"get": get("List the model", "models")},
        "/v1/models/{model}": {"get": get("Describe the model", "models", [_MODEL_ID])},
        "/tokenize": {"post": post("Token ids of a text or a chat", TokenizeRequest)},
        "/detokenize": {"post": post("The text of token ids", DetokenizeRequest)},
        "/v1/files": {
            "get": get("List files", "files"),
            "post": _operation("Upload a file", "files", body=upload),
        },
        "/v1/files/{file_id}": {
            "get": get("Describe a file", "files", [_FILE_ID]),
            "delete": _operation("Delete a file", "files", [_FILE_ID]),
        },
        "/v1/files/{file_id}/content": {
            "get": _operation("Download a file", "files", [_FILE_ID], answer=lines)
        },
        "/v1/batches": {
            "get": get("List batches", "batches"),
            "post": post("Run a file of requests", BatchRequest, tag="batches"),
        },
        "/v1/batches/{batch_id}": {"get": get("Describe a batch", "batches", [_BATCH_ID])},
        "/v1/batches/{batch_id}/cancel": {
            "post": _operation("Stop a batch", "batches", [_BATCH_ID])
        },
        "/health": {"get": get("200 once requests are served, else 503", "server")},
        "/version": {"get": get("The version of hotset", "server")},
        "/status.json": {"get": get("What the status page shows", "server")},
        "/metrics": {"get": _operation("Metrics for Prometheus", "server", answer=_TEXT)},
    }


def _post(
    summary: str,
    body: type[BaseModel],
    *,
    tag: str = "generation",
    extra: Json | None = None,
    error: str = "Error",
) -> Json:
    schema = {"$ref": _REF.format(model=body.__name__)}
    return _operation(
        summary,
        tag,
        body={"application/json": {"schema": schema}},
        answer={"application/json": {"schema": _OBJECT}, **(extra or {})},
        error=error,
    )


def _get(summary: str, tag: str, parameters: list[Json] | None = None) -> Json:
    return _operation(summary, tag, parameters)


def _operation(
    summary: str,
    tag: str,
    parameters: list[Json] | None = None,
    *,
    body: Json | None = None,
    answer: Json | None = None,
    error: str = "Error",
) -> Json:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=error)}}}
    errors = _MESSAGES_ERRORS if error == _MESSAGES else _ERRORS
    operation: Json = {
        "summary": summary,
        "tags": [tag],
        "responses": {
            "200": {
                "description": "Done.",
                "content": answer or {"application/json": {"schema": _OBJECT}},
            },
            **{
                str(code): {"description": text, "content": content}
                for code, text in errors.items()
            },
        },
    }
    if parameters:
        operation["parameters"] = parameters
    if body:
        operation["requestBody"] = {"required": True, "content": body}
    return operation
