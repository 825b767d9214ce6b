"""The test files that the changed files can break: those that import them, however far away, nearest first.

python scripts/affected_tests.py                # against HEAD: what is not committed yet
python scripts/affected_tests.py --base main    # against another commit
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"vlm_dist": "", "vlm_kernels": "kernels/", "tests": ""}
# What is no import: the tests that read such files. The longest beginning of a path that fits counts; "all" is every test.
READERS = {
    "": [],
    "docs/": ["tests/test_documentation.py", "tests/test_site.py", "tests/test_notebooks.py"],
    "README.md": ["tests/test_documentation.py"],
    "CONTRIBUTING.md": ["tests/test_documentation.py", "tests/test_site.py"],
    "mkdocs.yml": ["tests/test_site.py"],
    "configs/": ["tests/test_config.py", "tests/launch/test_cluster_files.py", "tests/test_documentation.py"],
    "launch/": ["tests/launch", "tests/training/test_train.py", "tests/house"],
    "scripts/": ["tests/house", "tests/test_site.py", "tests/test_documentation.py"],
    "scripts/bench/": ["tests/kernels/test_bench.py", "tests/house"],
    "vlm_dist/reporting/": ["tests/reporting"],
    "constraints.txt": ["all"],
    "setup.py": ["all"],
    "pyproject.toml": ["all"],
}
ALWAYS = ["tests/house"]


def changed_files(base: str) -> list[str]:
    """Files that differ from a commit, new ones too."""
    commands = (["git", "diff", "--name-only", base], ["git", "ls-files", "--others", "--exclude-standard"])
    return sorted({line for command in commands for line in subprocess.check_output(command, cwd=ROOT, text=True).splitlines()})


def affected(files: Iterable[str]) -> list[str]:
    """Paths for pytest; ["all"] where a changed file can break anything."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    graph = _imports()
    near: dict[str, int] = {}
    for file in files:
        module = _module(file)
        if module in graph.modules:
            for test, distance in _importers(graph, module).items():
                near[test] = min(distance, near.get(test, distance))
        elif not file.endswith(".py") or module is None:
            readers = READERS[max((start for start in READERS if file.startswith(start)), key=len)]
            if readers == ["all"]:
                return readers
            near |= {path: 0 for path in readers if (ROOT / path).exists()}
    found = sorted(near, key=lambda path: (near[path], path))
    return [path for path in ALWAYS if files and path not in found] + found


def _imports() -> grimp.ImportGraph:
    """Who imports whom, anywhere in a file. Two doors through which everything is reached are opened by name alone: a test that calls
    `vlm-dist chat` depends on the chat, one that uses `vlm_dist.train` on the training."""
    import vlm_dist

    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    commands = {name.rpartition(".")[2] for name in graph.find_children("vlm_dist.cli")} - {"main", "parsers"}
    doors = {f'"{"eval" if name == "evaluate" else name}"': ("vlm_dist.cli.main", f"vlm_dist.cli.{name}") for name in commands}
    doors |= {rf"\b{name}\b": ("vlm_dist", module) for name, (module, _) in vlm_dist._LAZY.items()}
    texts = {name: path.read_text() for name in graph.modules if (path := ROOT / (name.replace(".", "/") + ".py")).is_file()}
    for word, (door, behind) in doors.items():
        users = [name for name in graph.find_modules_that_directly_import(door) | graph.find_modules_that_directly_import("tests.conftest")
                 if name.startswith("tests.") and re.search(word, texts.get(name, ""))]  # fmt: skip
        graph.remove_import(importer=door, imported=behind)
        for user in users:
            graph.add_import(importer=user, imported=behind)
    return graph


def _module(file: str) -> str | None:
    """vlm_dist/data/tar.py -> vlm_dist.data.tar"""
    for package, root in PACKAGES.items():
        if file.startswith(f"{root}{package}/") and file.endswith(".py"):
            return file.removeprefix(root).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return None


def _importers(graph: grimp.ImportGraph, module: str) -> dict[str, int]:
    """Test file -> over how many imports it reaches the module."""
    found, ring, distance = {}, {module}, 0
    seen = set(ring)
    while ring:
        for name in ring:
            if name.rpartition(".")[2].startswith("test_"):
                found[name.replace(".", "/") + ".py"] = distance
        ring = {above for name in ring for above in graph.find_modules_that_directly_import(name)} - seen
        seen |= ring
        distance += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD", help="a commit (default: HEAD)")
    print("\n".join(affected(changed_files(parser.parse_args().base))))


if __name__ == "__main__":
    main()
