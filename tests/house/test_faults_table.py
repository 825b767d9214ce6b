"""docs/reliability.md is made from tests/faults/rows.yaml, whose tests are there; and every file of faults is in it."""

from __future__ import annotations

import ast
import importlib.util

from tests.conftest import ROOT

KEYS = {"fault", "made", "seen", "code", "lost", "tests"}


def script():
    spec = importlib.util.spec_from_file_location("faults_table", ROOT / "scripts" / "faults_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[dict]:
    return [row for part in script().read_rows().values() for row in part]


def test_the_page_is_made_from_the_rows():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert script().rendered(page) == page, "python scripts/faults_table.py"


def test_every_row_is_whole_and_its_tests_are_there():
    known: dict[str, set[str]] = {}
    for row in rows():
        assert row.keys() - {"recovery"} == KEYS and row["tests"], row
        for name in row["tests"]:
            file, _, function = name.partition("::")
            if file not in known:
                tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
                known[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in known[file], name


def test_every_file_of_faults_is_in_a_row():
    named = {name.partition("::")[0] for row in rows() for name in row["tests"]}
    for path in (ROOT / "tests" / "faults").glob("test_*.py"):
        assert f"faults/{path.name}" in named, path.name
