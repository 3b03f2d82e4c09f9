"""Calls that a request asks for by force: the JSON schema of an output that is nothing else."""

from collections.abc import Sequence
from typing import Any

from hotset.errors import RequestError

Json = dict[str, Any]


def forced_schema(tools: Sequence[Json], *, name: str | None, parallel: bool) -> Json:
    """The JSON schema of an output that can only be calls, as `ToolCallParser` reads them.

    A model whose own calls are XML writes these as JSON all the same.

    Args:
        tools: the `function` objects of the request.
        name: of the one to call; None leaves the choice.
        parallel: whether there may be several calls.

    Raises:
        RequestError: there is no tool of that name, or two have `$defs` of one name.
    """
    if name is not None:
        for tool in tools:
            if tool["name"] == name:
                return tool.get("parameters") or {"type": "object"}
        raise RequestError(
            f"tool_choice names {name!r}, which is not among the tools", param="tool_choice"
        )
    definitions: Json = {}
    calls = []
    for tool in tools:
        parameters = dict(tool.get("parameters") or {"type": "object"})
        for key, value in (parameters.pop("$defs", None) or {}).items():
            if definitions.setdefault(key, value) != value:
                raise RequestError(
                    f"two tools define {key!r} in $defs, each another way", param="tools"
                )
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: Json = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema
