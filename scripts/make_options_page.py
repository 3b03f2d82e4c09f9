"""Writes docs/options.md from the declarations of `option_groups.py` and `expert_options.py`."""

from pathlib import Path

from hotset.option_fields import Option
from hotset.options import GROUPS, own_options

PAGE = Path(__file__).parents[1] / "docs/options.md"
INTRODUCTION = """\
# Options of the engine

Made by `scripts/make_options_page.py` from `option_groups.py` and `expert_options.py`. An option
has one name in three places: `--hot-gib 8` on the command line, `hot-gib = 8` or `hot_gib = 8` in
the TOML file of `hotset serve --config FILE`, and `hot_gib=8` in Python, for `LLM(...)` and
`Options.of(...)`. All three take and refuse the same values. An option marked "Python only" has
no flag.
"""


def make_page() -> str:
    """The text of the page: a section for each group, in the order of `--help`."""
    sections = [INTRODUCTION]
    for title, group in GROUPS.items():
        sections += [f"## {title}", *(_entry(one) for one in own_options(group))]
    return "\n".join(sections)


def _entry(option: Option) -> str:
    facts = [", ".join(f"`{flag}`" for flag in option.flags) or "Python only"]
    if option.choices:
        facts.append("one of " + ", ".join(f"`{choice}`" for choice in option.choices))
    if option.bounds is not None:
        facts.append(f"takes {option.bounds.expected}")
    default = option.otherwise or ("none" if option.default is None else f"`{option.default}`")
    facts.append(f"default: {default}")
    text = " ".join(part for part in (option.help, option.more) if part)
    return f"**`{option.name}`** ({'; '.join(facts)}). {text}\n"


if __name__ == "__main__":
    PAGE.write_text(make_page())
