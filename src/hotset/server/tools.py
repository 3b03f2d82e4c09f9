"""Tools of a request: functions, and others that are skipped."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from hotset.server.body import Json, Part
from hotset.server.validation import shown


class Function(Part):
    """A function the model may call."""

    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    parameters: Json | None = None
    strict: bool = False


class Tool(Part):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class OtherTool(BaseModel):
    """A tool of a type that is not known here, such as `web_search`: skipped, with a warning."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str


def tool_tag(tool: Any) -> str:
    """Which branch of a union of tools is meant: `function tool`, or `other tool`."""
    kind = tool.get("type", "function") if isinstance(tool, dict) else "function"
    return "other tool" if isinstance(kind, str) and kind != "function" else "function tool"


class ToolUser(Part):
    """A body with tools."""

    all_tools: list[
        Annotated[
            Annotated[Tool, Tag("function tool")] | Annotated[OtherTool, Tag("other tool")],
            Discriminator(tool_tag),
        ]
    ] = Field(default_factory=list, alias="tools")

    @property
    def tools(self) -> list[Tool]:
        """The functions."""
        return [tool for tool in self.all_tools if isinstance(tool, Tool)]

    @property
    def skipped_tools(self) -> str | None:
        """One line about tools that the model is not told of, if there are any."""
        kinds = [shown(tool.type) for tool in self.all_tools if isinstance(tool, OtherTool)]
        if not kinds:
            return None
        names = ", ".join(dict.fromkeys(kinds))
        return f"tools of type {names} are skipped: functions are the only type here"


class FunctionName(Part):
    """The function to call."""

    name: str


class NamedTool(Part):
    """The tool to call."""

    type: Literal["function"]
    function: FunctionName
