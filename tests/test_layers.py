"""Who may import what (docs/architecture.md), and which modules start without torch."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import hotset

ROOT = Path(hotset.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__init__.py")

# A package may import those above it in ORDER, and plain data, which imports nothing else.
PLAIN = {
    "request",
    "sequence",
    "clock",
    "eviction",
    "option_fields",
    "expert_options",
    "option_groups",
    "options",
    "units",
    "errors",
    "secret",
    "metrics",
    "cgroups",
    "cpu_libraries",
    "libraries",
    "garbage",
    "foreign_text",
    "layout",
    "weight_format",
}
ORDER = [
    "cost",
    "kernels",
    "linear",
    "parallel",
    "memory",
    "kv",
    "grammar",
    "checkpoint",
    "experts",
    "plan",
    "attention",
    "executor",
    "model",
    "ranks",
    "text",
    "engine",
    "fleet",
    "llm",
    "server",
    "bench",
    "cli",
    "__main__",
]
# A module decides, and starts fast, without these if its docstring or its package's says so.
HEAVY = {"torch", "transformers", "numpy"}
PROMISE = "Imports no torch."
NUMPY_PROMISE = "Imports numpy, no torch."


def part_of(module: str) -> str:
    """`hotset.memory.tier` -> `memory`, `hotset.llm` -> `llm`, `hotset` -> ``."""
    return [*module.split("."), ""][1]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "hotset":
                found |= {f"hotset.{alias.name}" for alias in node.names}
    return {part_of(name) for name in found if name.split(".")[0] == "hotset"} - {""}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_is_below_it(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    imported = imports_of(path) - {"__version__", "LLM", "SamplingParams"}
    if part in PLAIN:
        assert imported <= PLAIN
    else:
        assert part in ORDER, f"give {part} a place in ORDER"
        below = set(ORDER[: ORDER.index(part) + 1])
        assert imported <= PLAIN | below


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_json_and_toml_are_read_by_one_module(path: Path) -> None:
    """`json.loads` ends in RecursionError where a text is deep: take `foreign_text.parse_json`."""
    if path.name == "foreign_text.py":
        return
    tree = ast.parse(path.read_text())
    readers = [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    assert not {"json.load", "json.loads", "tomllib.load", "tomllib.loads"} & set(readers)


def name_of(path: Path) -> str:
    return ".".join(["hotset", *path.relative_to(ROOT).with_suffix("").parts])


def promises(path: Path, promise: str) -> bool:
    packages = [folder / "__init__.py" for folder in path.parents if ROOT in folder.parents]
    return any(
        promise in (ast.get_docstring(ast.parse(p.read_text())) or "") for p in [path, *packages]
    )


def test_modules_that_promise_to_import_no_torch_keep_it() -> None:
    names = [name_of(path) for path in MODULES if promises(path, PROMISE)]
    assert {"hotset.cost.step_time", "hotset.kv.cache", "hotset.engine.scheduler"} <= set(names)
    with_numpy = [name_of(path) for path in MODULES if promises(path, NUMPY_PROMISE)]
    assert "hotset.engine.engine" in with_numpy
    code = f"""
import sys
for name in {names!r}:
    __import__(name)
    assert not {HEAVY!r} & set(sys.modules), name
for name in {with_numpy!r}:
    __import__(name)
    assert not {HEAVY - {"numpy"}!r} & set(sys.modules), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_engine_and_the_library_start_without_triton() -> None:
    """Only kernels need it, which a CPU does not run."""
    code = "import sys; sys.modules['triton'] = None; import hotset.llm, hotset.engine.build"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_modules_of_tests_have_names_of_their_own() -> None:
    """The folders of tests are no packages, so that two modules of one name are one to pytest."""
    tests = Path(__file__).parent
    modules = [*tests.rglob("*.py"), *(tests.parent / "benchmarks").glob("*.py")]
    names = Counter(path.name for path in modules)
    assert [name for name, count in names.items() if count > 1] == ["conftest.py"]
