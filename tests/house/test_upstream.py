"""Other libraries' private names: all of them in vlm_dist/upstream, all of them there in the versions that are installed."""

from __future__ import annotations

import ast
import importlib
from functools import reduce
from importlib import metadata

import pytest

from tests.conftest import ROOT
from tests.house.test_rules import FILES, parse

LIBRARIES = sorted(path.stem for path in (ROOT / "vlm_dist" / "upstream").glob("[!_]*.py"))
# The kernels are a package of their own and import nothing of vlm_dist; they have one such name.
ELSEWHERE = {
    "kernels/vlm_kernels/common.py": {"_subclasses"},
    "kernels/vlm_kernels/nf4_lora_group.py": {"_foreach_copy_", "_foreach_mul"},
    "kernels/vlm_kernels/operation.py": {"_C", "_dispatch_keys", "_len_torch_dispatch_stack"},
}


def find(dotted: str) -> object:
    """The object of a dotted name: the longest part that is a module, then attributes."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        return reduce(getattr, parts[length:], module)
    raise ImportError(dotted)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_names_are_still_there(library):
    seen = importlib.import_module(f"vlm_dist.upstream.{library}")
    installed = metadata.version(library)
    for name in seen.NAMES:
        try:
            find(name)
        except (ImportError, AttributeError):
            pytest.fail(f"{library} {installed} has no {name} any more (it was there in {seen.SEEN}); mend vlm_dist/upstream/{library}.py")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_versions_are_those_of_the_suite(library):
    """After an upgrade: read the library's changes, then set SEEN."""
    seen = importlib.import_module(f"vlm_dist.upstream.{library}").SEEN
    assert f"{library}=={seen}" in (ROOT / "constraints.txt").read_text().splitlines(), f"vlm_dist/upstream/{library}.py: SEEN = {seen}"


def test_a_name_that_is_gone_is_found():
    with pytest.raises(AttributeError):
        find("torch.UntypedStorage._no_such_name")


def ours() -> set[str]:
    """Private names that our own code defines: methods, attributes of self, functions, module names."""
    names = {"_asdict", "_replace"}  # public parts of named tuples
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
                if node.value.id == "self":
                    names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_touches_private_names(path):
    place = str(path.relative_to(ROOT))
    if place.startswith("vlm_dist/upstream/"):
        return
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and private(node.attr):
            found.add(node.attr)
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("vlm_"):
            found |= {part for part in [*node.module.split("."), *(alias.name for alias in node.names)] if private(part)}
    found -= OURS | ELSEWHERE.get(place, set()) | {"_exit"}  # os._exit: private by its name alone
    assert not found, f"{place} uses {sorted(found)} of another library; put it into vlm_dist/upstream"


OURS = ours()
