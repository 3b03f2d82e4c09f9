"""Writes docs/options.md from the fields of `EngineConfig`."""

from pathlib import Path

from hotset.config import EngineConfig
from hotset.options import Option, options_of

PAGE = Path(__file__).parents[1] / "docs/options.md"
INTRODUCTION = """\
# Options of the engine

Made by `scripts/make_options_page.py` from the fields of `config.py`. An option has one name in
three places: `--hot-gib 8` on the command line, `hot-gib = 8` or `hot_gib = 8` in the TOML file of
`hotset serve --config FILE`, and `hot_gib=8` in Python, for `LLM(...)` and `EngineConfig(...)`. All
three take and refuse the same values. An option marked "Python only" has no flag.
"""


def make_page() -> str:
    """The text of the page, an entry for each option in the order of `--help`."""
    entries = [_entry(option) for option in options_of(EngineConfig).values()]
    return "\n".join([INTRODUCTION, *entries])


def _entry(option: Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in option.flags) or "Python only"
    facts = [flags]
    if option.unit:
        facts.append(f"in {option.unit}")
    if option.choices:
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in option.choices))
    if option.within is not None:
        facts.append(f"takes {option.within.expected}")
    default = option.if_none or ("none" if option.default is None else f"`{option.default}`")
    facts.append(f"default: {default}")
    text = " ".join(part for part in (option.help, option.details) if part)
    return f"**`{option.name}`** ({'; '.join(facts)}). {text}\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
