"""`hotset generate`: stream text for prompts given on the command line."""

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hotset.cli.options import Command, engine_options, flags, runs_on_ranks
from hotset.errors import ConfigError, RequestError
from hotset.foreign_text import ForeignTextError, parse_json
from hotset.option_fields import options_of
from hotset.options import Options
from hotset.request import SamplingParams, TextForm

if TYPE_CHECKING:
    from hotset.engine.output_stream import OutputStream
    from hotset.engine.service import EngineService

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@click.command(cls=Command)
@click.argument("words", metavar="[MODEL] PROMPT...", nargs=-1, required=True)
@click.option("--raw", is_flag=True, help="Continue the text itself; no chat template.")
@click.option("--system", help="A system message before the prompt.")
@click.option(  # of the engine's options, as prompts of one command should not draw alike
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of sampled texts: the same seed gives the same ones.",
)
@click.option("--keep-special-tokens", is_flag=True, help="Special tokens are part of the text.")
@click.option(
    "--logit-bias",
    multiple=True,
    metavar="ID=BIAS",
    help="Adds -100 to 100 to the logit of a token id; may be repeated.",
)
@click.option("--regex", help="A regular expression that the whole text must fit.")
@click.option("--choice", multiple=True, help="A text that may be the answer; repeat for others.")
@click.option("--json-schema", help="A JSON schema, or a file with one, that the text must fit.")
@click.option("--quiet", "-q", is_flag=True, help="Nothing on stderr but errors.")
@flags("sampling", options_of(SamplingParams), dict)
@engine_options
@runs_on_ranks
def command(
    words: tuple[str, ...],
    raw: bool,
    system: str | None,
    quiet: bool,
    sampling: dict[str, Any],
    options: Options,
    **given: Any,
) -> None:
    r"""Stream the answer to each PROMPT to stdout; all else goes to stderr.

    A prompt is a user's message in the model's chat template, or with --raw a text to continue.
    A PROMPT of - is read from standard input. Several prompts run at once, and are printed in
    order.

    MODEL may stand first instead of --model. The first word is taken as one only if others
    follow, --model is not given, and it is an existing folder, ends in .gguf, or has the form
    of a hub id (owner/name).

    \b
    Examples:
      hotset generate "What is the capital of France?"
      hotset generate --raw --max-tokens 40 "Once upon a time"
      cat notes.txt | hotset generate --system "Summarise." -
    """
    model, prompts = _split(words, options.model.model)
    if raw and system is not None:
        raise ConfigError("--system needs the chat template; leave out --raw, or --system")
    if prompts.count("-") > 1:
        raise ConfigError("standard input can be read for one prompt only; give one -")
    params = _params(sampling, **given)
    texts = [_read_stdin() if prompt == "-" else prompt for prompt in prompts]
    if not all(texts):
        raise ConfigError("a prompt is empty; expected text")

    from hotset.engine.service import EngineService  # imports torch: not for --help

    with contextlib.closing(EngineService(options.but(model=model))) as service:
        if not quiet:
            click.echo(service.report, err=True)
        start_s = time.perf_counter()
        streams = _submit(service, texts, params, raw=raw, system=system)
        num_tokens, first_s = _print_all(service, streams, texts, quiet=quiet)
        if not quiet:
            wall_s = time.perf_counter() - start_s
            first_after_s = wall_s if first_s is None else first_s - start_s
            click.echo(
                f"{num_tokens} tokens in {wall_s:.1f} s ({num_tokens / wall_s:.1f} tokens/s, "
                f"first after {first_after_s:.2f} s)",
                err=True,
            )


def _params(
    sampling: dict[str, Any],
    *,
    seed: int,
    keep_special_tokens: bool,
    logit_bias: tuple[str, ...],
    json_schema: str | None,
    regex: str | None,
    choice: tuple[str, ...],
) -> SamplingParams:
    if sampling["max_tokens"] < 1:
        raise ConfigError(f"max_tokens is {sampling['max_tokens']}; expected 1 or more")
    return SamplingParams(
        **sampling,
        seed=seed,
        skip_special_tokens=not keep_special_tokens,
        logit_bias=_read_biases(logit_bias),
        **_form_of(json_schema, regex, choice),
    )


def _submit(
    service: "EngineService",
    texts: list[str],
    params: SamplingParams,
    *,
    raw: bool,
    system: str | None,
) -> "list[OutputStream]":
    from hotset.text.prompt import PromptEncoder

    encoder = PromptEncoder(service.model)
    head = [] if system is None else [{"role": "system", "content": system}]
    return [
        service.submit(
            encoder.encode_text(text)
            if raw
            else encoder.encode_chat([*head, {"role": "user", "content": text}]),
            params,
        )
        for text in texts
    ]


def _form_of(json_schema: str | None, regex: str | None, choice: tuple[str, ...]) -> dict[str, Any]:
    """The field of `SamplingParams` that says what an output has to fit, if it has to."""
    given = {"--json-schema": json_schema, "--regex": regex, "--choice": choice or None}
    forms = [name for name, value in given.items() if value is not None]
    if len(forms) > 1:
        raise ConfigError(f"{forms[0]} and {forms[1]} are both given; expected one of them")
    if json_schema is not None:
        return {"json_schema": _read_schema(json_schema)}
    if regex is not None:
        return {"text_form": TextForm("regex", regex)}
    return {"text_form": TextForm("choice", json.dumps(choice))} if choice else {}


def _print_all(
    service: "EngineService", streams: "list[OutputStream]", texts: list[str], *, quiet: bool
) -> tuple[int, float | None]:
    """Print the streams in order; returns their tokens, and when the first of them came."""
    num_tokens, first_s = 0, None
    for position, (stream, text) in enumerate(zip(streams, texts, strict=True)):
        if len(streams) > 1 and not quiet:
            title = text if len(text) <= 70 else f"{text[:67]}..."
            click.echo(f"[{position + 1}] {title!r}", err=True)
        for output in stream:
            if output.error is not None:
                service.raise_unless_healthy()
                raise RequestError(output.error)
            first_s = first_s or time.perf_counter()
            num_tokens += len(output.token_ids)
            sys.stdout.write(output.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
    return num_tokens, first_s


def _split(words: tuple[str, ...], model: str | None) -> tuple[str | None, list[str]]:
    """The model and the prompts among the words of the command line."""
    first = words[0]
    if model is None and len(words) > 1:
        names_model = first.endswith(".gguf") or _HUB_ID.fullmatch(first) or _is_folder(first)
        if names_model:
            return first, list(words[1:])
    return model, list(words)


def _is_folder(word: str) -> bool:
    try:
        return Path(word).expanduser().is_dir()
    except (OSError, RuntimeError):  # too long for a name; no such user
        return False


def _read_stdin() -> str:
    text = sys.stdin.read().strip("\n")
    if not text:
        raise ConfigError("standard input is empty; expected a prompt")
    return text


def _read_biases(given: tuple[str, ...]) -> dict[int, float]:
    """Token ids and what is added to their logits."""
    biases = {}
    for one in given:
        token_id, _, bias = one.partition("=")
        try:
            biases[int(token_id)] = float(bias)
        except ValueError as error:
            raise ConfigError(
                f"--logit-bias is {one!r}; expected ID=BIAS, such as 50=-100"
            ) from error
    return biases


def _read_schema(given: str) -> dict[str, Any]:
    """A JSON schema from the option's text, or from the file that it names."""
    text = given
    if not given.lstrip().startswith("{"):
        try:
            text = Path(given).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--json-schema {given}: cannot be read: {error}") from error
    try:
        schema = parse_json(text)
    except ForeignTextError as error:
        raise ConfigError(f"--json-schema {error}") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"--json-schema is a JSON {type(schema).__name__}; expected an object")
    return schema
