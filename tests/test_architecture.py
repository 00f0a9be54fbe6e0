"""The arrows between the folders, read from the imports, and the rules that hold for every file."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fedkd.config import defaults
from fedkd.method import load, names

ROOT = Path(__file__).parent.parent
FOLDERS = ("fedkd", "strategies", "clients", "sims", "plots")

ALLOWED: dict[str, tuple[str, ...]] = {
    "fedkd": ("fedkd",),
    "strategies": ("fedkd", "strategies"),
    "clients": ("fedkd", "clients"),
    "sims": ("fedkd", "sims", "plots", "clients.app", "strategies.app", "strategies.build"),
    "plots": ("fedkd.results", "fedkd.metrics", "fedkd.samples", "fedkd.errors", "fedkd.method", "plots"),
}
"""What a folder may import of the project: these modules and what is inside them."""

DATA_AS_CODE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
"""Modules whose files can run code when they are read."""


def files(*folders: str) -> list[str]:
    """Return the Python files below some folders, relative to the project."""
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def tree(file: str) -> ast.Module:
    """Parse a file of the project."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports(module: ast.AST) -> Iterator[str]:
    """Yield the full name of everything imported, also inside functions; a relative import starts with a dot."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def within(name: str, modules: tuple[str, ...]) -> bool:
    """Say whether a name is one of the modules, or in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("file", files(*FOLDERS))
def test_imports_follow_the_arrows(file: str) -> None:
    """A folder is a process: what it imports has to be there, and nothing else may leak into it."""
    folder = file.split("/")[0]
    wrong = [name for name in imports(tree(file)) if within(name, FOLDERS) and not within(name, ALLOWED[folder])]
    assert not wrong, f"{file} imports {wrong}; {folder} may import {ALLOWED[folder]}"


@pytest.mark.parametrize("file", files(*FOLDERS))
def test_imports_are_absolute(file: str) -> None:
    """A relative import would hide which folder it reaches into."""
    assert not [name for name in imports(tree(file)) if name.startswith(".")]


@pytest.mark.parametrize("file", files(*FOLDERS, "tests", "bench"))
def test_nothing_reads_data_that_can_run_code(file: str) -> None:
    """States, caches and results are data only: no pickle in any of its forms."""
    module = tree(file)
    assert not [name for name in imports(module) if name.split(".")[0] in DATA_AS_CODE]
    for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("load", "save", "read_pickle"):
            assert ast.unparse(call.func.value) not in ("torch", "pd", "pandas")
        for keyword in call.keywords:
            if keyword.arg == "allow_pickle":
                assert isinstance(keyword.value, ast.Constant)
                assert keyword.value.value is False


def test_the_rules_catch_what_they_forbid() -> None:
    """A rule that finds nothing anywhere proves nothing."""
    found = list(imports(ast.parse("def f():\n    from clients.fedavg import update\n    import strategies.base")))
    assert found == ["clients.fedavg.update", "strategies.base"]
    assert not within("fedkd.results_extra.f", ("fedkd.results",))
    assert within("fedkd.results.Run", ("fedkd.results",))


@pytest.mark.parametrize("name", names())
def test_a_method_has_one_name_everywhere(name: str) -> None:
    """Contract, client half, server half and page are found by one name."""
    assert load(name).name == name
    assert (ROOT / "clients" / f"{name}.py").is_file()
    assert (ROOT / "strategies" / f"{name}.py").is_file()
    pages = ROOT / "docs" / "methods"
    if any(pages.glob("*.md")):
        assert (pages / f"{name}.md").is_file(), f"write docs/methods/{name}.md"


@pytest.mark.parametrize("name", names())
def test_a_page_names_what_crosses_the_network_and_every_setting(name: str) -> None:
    """A field that is not FedAvg's, and a key, which nobody has described, is one that nobody can judge."""
    page, method = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8"), load(name)
    keys = {key.replace("_", "-") for key in method.hyper.model_fields}
    records = [method.Broadcast, method.Update, method.Personal, method.Scoring]
    fields = {field for record in records if record for field in record.specs()}
    if "as `fedavg`" in page or "base method sends" in page:
        fields -= {*load("fedavg").Broadcast.specs(), *load("fedavg").Update.specs()}
    missing = sorted(word for word in keys | fields if not any(f"`{head}{word}`" in page for head in ("", f"{name}.")))
    assert not missing, f"docs/methods/{name}.md does not say what {', '.join(missing)} is"
    assert all(word in page.lower() for word in ("stays", "cost per round", "gradient", "how it was checked", "depart"))


@pytest.mark.parametrize("name", names())
def test_a_page_says_every_default(name: str) -> None:
    """In the row of the key, so that a reader need not run anything to know what an unset key does."""
    page, common = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8"), load("fedavg").hyper()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    wrong = []
    for key, value in load(name).hyper().model_dump(by_alias=True).items():
        texts = [text for keys, text, *_ in rows if {f"`{key}`", f"`{name}.{key}`"} & set(keys.split(", "))]
        elsewhere = [
            "the base's",
            *(["as `fedavg`"] if getattr(common, key, None) == value and name != "fedavg" else []),
        ]
        if not any(says(text, value) or any(words in text for words in elsewhere) for text in texts):
            wrong.append(f"{key} = {value!r}")
    assert not wrong, f"docs/methods/{name}.md does not say the default of {', '.join(wrong)}"


def says(text: str, value: str | float | bool) -> bool:
    """Say whether a text has a value in it, as people write them."""
    words = re.findall(r"[\w.+-]*[\w]", text)
    if isinstance(value, bool):
        return bool({"on", "true"} & set(words)) if value else bool({"off", "false"} & set(words))
    if isinstance(value, str):
        return value in words if value else text.startswith("all ")
    return any(number(word) == value for word in words)


def number(word: str) -> float | None:
    """Return what a word is as a number, if it is one."""
    try:
        return float(word)
    except ValueError:
        return None


def test_a_value_is_found_however_it_is_written() -> None:
    """And none that is not there."""
    assert says("ours, 1e-3 (paper)", 0.001)
    assert says("15; lambda", 15.0)
    assert says("`logits`, or `probabilities`", "logits")
    assert says(" on ", True)
    assert not says("0.15", 15.0)
    assert not says("weighted", "weight")
    assert not says("one", True)


@pytest.mark.parametrize("name", names())
def test_a_contract_names_the_variants_that_it_takes(name: str) -> None:
    """``variants`` and the choices of the field ``variant`` are the same list."""
    field = load(name).hyper.model_fields.get("variant")
    choices = getattr(field.annotation, "__args__", ()) if field else ()
    assert set(load(name).variants) == set(choices)


def test_flower_offers_every_key_with_its_default() -> None:
    """``flwr run`` accepts only keys that stand in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tables = project["tool"]["flwr"]["app"]["config"]
    written = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items()}
    assert written == defaults(), "the keys of pyproject.toml are out of date: run `make config`"


def test_defaults_keep_their_types_in_pyproject() -> None:
    """Flower refuses an override whose type differs from the default's, so 1.0 must not be written as 1."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tables = project["tool"]["flwr"]["app"]["config"]
    for key, value in defaults().items():
        section, name = key.split(".", 1)
        assert type(tables[section][name]) is type(value), key
