"""What a user sees who types something wrong: one line, a status, no traceback."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hotset.cli import COMMANDS, main


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hotset", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", [[], *(name.split() for name in sorted(COMMANDS))])
def test_help_names_the_command_and_succeeds(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Usage: hotset " + " ".join(command))
    assert "\\b" not in shown


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["generate", "--max-tokens", "0", "hi"], 1, "--max-tokens is 0; expected 1 or more"),
        (["generate", "--min-tokens", "9", "--max-tokens", "8", "hi"], 1, "--min-tokens is 9"),
        (["generate", "--logit-bias", "5", "hi"], 1, "expected ID=BIAS"),
        (["generate", "--logit-bias", "5=101", "hi"], 1, "expected -100 to 100"),
        (["generate", "--regex", "a", "--choice", "a", "hi"], 1, "--regex and --choice are both"),
        (["nosuch"], 2, "No such command 'nosuch'. (see: hotset --help)"),
        (["plan", "--nosuch"], 2, "No such option '--nosuch'"),
        (["generate"], 2, "Missing argument '[MODEL] PROMPT...'. (see: hotset generate --help)"),
        (["generate", ""], 1, "a prompt is empty"),
        (["generate", "--temperature", "nan", "hi"], 1, "temperature is nan; expected 0 (greedy)"),
        (["generate", "--json-schema", "nosuch.json", "hi"], 1, "nosuch.json: cannot be read"),
        (["generate", "--json-schema", "[]", "hi"], 1, "--json-schema []: cannot be read"),
        (["generate", "--raw", "--system", "x", "hi"], 1, "--system needs the chat template"),
        (["generate", "--hot-gib", "inf", "hi"], 1, "--hot-gib is inf; expected a size above 0"),
        (["generate", "--hot-gib", "nan", "hi"], 1, "--hot-gib is nan"),
        (["generate", "--host-gib", "inf", "hi"], 1, "--host-gib is inf; expected 0 (none)"),
        (["generate", "--disk-gib", "-1", "hi"], 1, "--disk-gib is -1.0"),
        (["generate", "--disk-path", "/tmp", "hi"], 1, "--disk-path is '/tmp' but --disk-gib"),
        (["generate", "--block-size", "0", "hi"], 1, "--block-size is 0; expected 1 to 1024"),
        (["plan", "nosuch"], 1, "model 'nosuch' is neither bundled"),
        (["plan", "llama-3-8b", "--hardware", "nosuch"], 1, "hardware 'nosuch' is unknown"),
        (["serve", "--port", "99999"], 2, "Invalid value for '--port'"),
        (["serve", "--files-gib", "nan"], 1, "--files-gib is nan; expected a size above 0"),
        (["serve", "--max-n", "0"], 1, "--max-n is 0; expected more than 0"),
        (["serve", "--rotation-s", "3"], 1, "--rotation-s is 3.0 but --host-gib is 0"),
        (["generate", "--top-p", "2", "hi"], 1, "--top-p is 2.0; expected above 0, at most 1"),
        (["generate", "--stop", "", "hi"], 1, "--stop is ('',); expected non-empty strings"),
        (["bench", "unshared", "--rate", "0"], 1, "--rate is 0.0; expected requests a second"),
        (["bench", "unshared", "--sessions", "0"], 1, "--sessions is 0; expected 1 or more"),
        (["bench", "--preset", "S-small", "--steady-steps", "200"], 1, "answers of 160 tokens end"),
        (["plan", "llama-3-8b", "--max-model-len", "0"], 1, "--max-model-len is '0'; expected"),
        (["plan", "llama-3-8b", "--output-tokens", "4k"], 1, "--output-tokens is 4096, which in"),
        (["plan", "llama-3-8b", "--hot-gib", "nan"], 1, "--hot-gib is nan; expected a number"),
        (["probe", "--output", "/proc/x/y"], 1, "profile /proc/x/y cannot be written"),
        (["demo", "--users", "0"], 2, "Invalid value for '--users'"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(
    words: list[str],
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *words) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_serve_names_the_port_that_is_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(monkeypatch, "serve", "--port", port) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    command = [sys.executable, "-m", "hotset", "plan", "llama-3-8b"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be used: No space left on device\n"


def test_an_empty_standard_input_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open() as empty:
        monkeypatch.setattr(sys, "stdin", empty)
        assert run(monkeypatch, "generate", "-") == 1
    assert "standard input is empty" in capsys.readouterr().err
