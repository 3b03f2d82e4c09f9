"""The `hotset` command. Each command is a module of this package, imported when it is called."""

import importlib
import sys

import click

from hotset import __version__
from hotset.errors import HotsetError

COMMANDS = {
    "batch": "Run an OpenAI batch file through the engine.",
    "demo": "Show what the tiers are for: the same work with and without them.",
    "generate": "Stream text for prompts given on the command line.",
    "plan": "Show where a model would live, how many users fit and how fast it should run.",
    "probe": "Measure the memory and links of this machine.",
    "serve": "Serve the OpenAI-compatible HTTP API.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use, so that `hotset plan` never imports torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import `hotset.cli.NAME` and return its `command`."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"hotset.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(__version__, prog_name="hotset")
def cli() -> None:
    """Serve models bigger than the GPU to more users than its memory can hold."""


def main() -> None:
    """Entry point: an expected error is one line on stderr and status 1."""
    try:
        cli(standalone_mode=True)
    except HotsetError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
