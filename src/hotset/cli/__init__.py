"""The `hotset` command. Each command is a module of this package, imported when it is called.

Imports no torch.
"""

import importlib
import os
import sys
from typing import NoReturn

import click

from hotset import __version__
from hotset.cpu_libraries import set_waiting
from hotset.errors import HotsetError

COMMANDS = {
    "bench": "Run the same work with and without tiers and say whether tiering paid.",
    "bench moe-gating": "Compare dynamic gating of experts with static gating.",
    "batch": "Run an OpenAI batch file through the engine.",
    "desk": "Keep files, run batches and lease limits of keys for the fronts of a fleet.",
    "demo": "Show what the tiers are for: the same work with and without them.",
    "demo-moe": "Show what expert buffering is: a quarter of the experts, the same answers.",
    "fleet": "Serve a model by several replicas on this machine.",
    "fleet revoke": "Have no replica use what one of them wrote to the stores.",
    "front": "Serve the HTTP API by the replicas of a fleet.",
    "generate": "Stream text for prompts given on the command line.",
    "plan": "Show where a model would live, how many users fit and how fast it should run.",
    "probe": "Measure the memory and links of this machine.",
    "replica": "Run one engine of a fleet, for the fronts that serve its API.",
    "serve": "Serve the OpenAI-compatible HTTP API.",
    "top": "Show what a running server does, in the terminal.",
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
        module = name.replace(" ", "_").replace("-", "_")
        command: click.Command = importlib.import_module(f"hotset.cli.{module}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with names of two words."""
        if (name := " ".join(args[:2])) in COMMANDS:
            return name, self.get_command(ctx, name), args[2:]
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(__version__, prog_name="hotset")
def cli() -> None:
    """Serve models bigger than the GPU to more users than its memory can hold."""


def main() -> None:
    """Entry point: an error is one line on stderr, with status 2 for wrong usage and else 1."""
    set_waiting()
    try:
        status = cli.main(prog_name="hotset", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "hotset"
        _fail(f"{error.format_message()} (see: {path} --help)", status=2)
    except (HotsetError, click.ClickException) as error:
        _fail(str(error))
    except click.Abort:
        _fail("interrupted", status=130)
    except BrokenPipeError:  # who read our output has left, as `head` does
        _drop_output()
        sys.exit(1)
    except OSError as error:
        _drop_output()
        _fail(f"{error.filename or 'the output'} cannot be used: {error.strerror or error}")
    sys.exit(status)


def _drop_output() -> None:
    """What is still to be written to stdout would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, *, status: int = 1) -> NoReturn:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)
