"""The pages stay true: what they link to, the files and tests they name, and their commands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotset.cli import COMMANDS, cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("benchmarks/results/*.md"))
OURS = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]

LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]+)?\)")
PATH = re.compile(r"`((?:[a-z_0-9]+/)+(?:[a-z_0-9]+\.(?:py|json|md))?)(?:::(\w+))?`")
COMMAND = re.compile(r"^(?:    )?hotset ([a-z-]+(?: moe-gating)?)((?: [^#&\n]+)?)", re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {f"#{re.sub(r'[^a-z0-9_ -]', '', title.lower()).replace(' ', '-')}" for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link, anchor in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors_of(target), link + anchor


@pytest.mark.parametrize("page", OURS)
def test_files_and_tests_that_a_page_names_exist(page: str) -> None:
    for path, test in PATH.findall((ROOT / page).read_text()):
        found = [
            folder / path
            for folder in (ROOT, ROOT / "src/hotset", ROOT / "tests")
            if (folder / path).exists()
        ]
        assert found, path
        if test:
            assert re.search(rf"\b(def|class) {test}\b", found[0].read_text()), f"{path}::{test}"


def commands_of(page: str) -> Iterator[tuple[str, list[str]]]:
    for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        for name, words in COMMAND.findall(block):
            yield name, re.findall(r"(?<!\S)(--[a-z][a-z-]*)", words)


@pytest.mark.parametrize("page", OURS)
def test_commands_of_a_page_have_only_flags_that_exist(page: str) -> None:
    for name, flags in commands_of(page):
        assert name in COMMANDS, name
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        known = {flag for param in command.params for flag in param.opts + param.secondary_opts}
        assert set(flags) <= known | {"--help"}, (name, flags)


def test_flags_of_serve_in_the_table_for_vllm_users_exist() -> None:
    rows = re.findall(r"^\| `[^|]*\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    serve = cli.get_command(None, "serve")  # type: ignore[arg-type]
    assert serve is not None and len(rows) > 10
    known = {flag for param in serve.params for flag in param.opts + param.secondary_opts}
    named = {flag for row in rows for flag in re.findall(r"`(--[a-z-]+)", row)}
    assert named and named <= known
