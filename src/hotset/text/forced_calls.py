"""Calls that a request forces: the JSON schema of an output that can only be calls."""

import copy
from collections.abc import Sequence
from typing import Any

from hotset.errors import RequestError
from hotset.grammar.nodes import walk

Json = dict[str, Any]


def forced_schema(tools: Sequence[Json], *, name: str | None, parallel: bool) -> Json:
    """The JSON schema of an output that can only be calls, as `ToolCallParser` reads them.

    A model whose own calls are XML writes these as JSON all the same.

    Args:
        tools: the `function` objects of the request.
        name: of the tool to call; None leaves the choice to the model.
        parallel: whether there may be several calls.

    Raises:
        RequestError: there is no tool of that name, or the parameters of one are no object.
    """
    if name is not None:
        for tool in tools:
            if tool["name"] == name:
                return _parameters(tool)
        raise RequestError(
            f"tool_choice names {name!r}, which is not among the tools", param="tool_choice"
        )
    definitions: Json = {}
    calls = []
    for i, tool in enumerate(tools):
        # At a place of its own, so that its references still resolve.
        definitions[f"tool{i}"] = _moved(_parameters(tool), f"#/$defs/tool{i}")
        arguments = {"$ref": f"#/$defs/tool{i}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: Json = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions}


def _parameters(tool: Json) -> Json:
    """The schema of a tool's arguments, which are an object whether it says so or not."""
    parameters = {**(tool.get("parameters") or {})}
    types = parameters.get("type", "object")
    if types != "object" and not (isinstance(types, list) and "object" in types):
        raise RequestError(
            f"tool {tool['name']!r} has parameters of type {types!r}; expected object",
            param="tools",
        )
    return {**parameters, "type": "object"}


def _moved(schema: Json, to: str) -> Json:
    """A schema with its references, which start at its own root, rewritten for the place `to`."""
    schema = copy.deepcopy(schema)
    for key in ("$schema", "$id"):
        schema.pop(key, None)
    for one in [one for one, _ in walk(schema)]:
        reference = one.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            one["$ref"] = to + reference[1:]
    return schema
