"""docs/security.md names everything that can run code which is not ours."""

from __future__ import annotations

import ast

import pytest

from tests.conftest import ROOT
from tests.house.test_rules import FILES, parse

CALLS = ("exec", "eval", "compile", "__import__", "import_module")
MODULES = (
    "subprocess.", "pickle.", "runpy.", "os.system", "os.popen", "os.exec", "os.spawn", "torch.load", "torch.hub",
    "importlib.import_module",
)  # fmt: skip
OF_OURS = {"vlm_dist/__init__.py"}  # its own modules, by fixed names
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def runs_code(tree: ast.Module) -> set[str]:
    """Names of calls that can run what a file, a setting or a package brings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name} if name in CALLS or name.startswith(MODULES) else set()
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.add(node.arg)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_runs_code_stands_on_the_page(path):
    name = str(path.relative_to(ROOT))
    if name not in OF_OURS and (found := runs_code(parse(path))):
        assert f"`{name.removeprefix('vlm_dist/').removeprefix('kernels/')}`" in PAGE, f"{name} can run code ({', '.join(sorted(found))})"


def test_every_file_that_the_page_names_is_there():
    import re

    for name in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE):
        assert any((ROOT / folder / name).exists() for folder in ("vlm_dist", "vlm_dist/checkpoints", ".", "kernels")), name


def test_it_is_found():
    assert runs_code(ast.parse("import torch\ntorch.load('x')\neval('1')\nmodel.eval()\nload(trust_remote_code=True)")) == {
        "torch.load", "eval", "trust_remote_code",
    }  # fmt: skip
