"""`hotset serve`: the OpenAI-compatible HTTP server."""

import functools

import click

from hotset.cli.config_file import config_flag
from hotset.cli.options import Command, engine_options, runs_on_ranks
from hotset.cli.server_flags import ServerFlags, listening, server_flags
from hotset.options import Options


@click.command(cls=Command)
@config_flag
@server_flags()
@click.option("--dry-run", is_flag=True, help="Set everything up, print what went where, and exit.")
@engine_options
@runs_on_ranks
def command(server: ServerFlags, dry_run: bool, options: Options) -> None:
    r"""Serve the OpenAI-compatible HTTP API, with a status page at / and the API at /docs.

    GET /health answers 503 until the model is loaded. Without API keys the server takes requests
    from this machine only.

    \b
    Example:
      hotset serve --port 8000
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}'
    """
    with listening(server) as opened:
        from hotset.cli import serving
        from hotset.engine.service import EngineService

        if dry_run:
            serving.dry_run(functools.partial(EngineService, options), opened.where)
        else:  # in a process of its own, where HTTP cannot delay its steps
            start = functools.partial(EngineService, options, own_process=True)
            serving.serve(start, opened, server.drain_s)
