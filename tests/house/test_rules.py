"""The rules of the house that a reader cannot keep in mind, held by the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment

FILES = sorted([*(ROOT / "vlm_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "launch").rglob("*.py")])
LEAVES = {
    "buffers", "cards", "config", "config_cluster", "config_load", "config_look", "config_model", "config_text", "deepspeed_config",
    "disk", "distributed", "environment", "errors", "families", "hosts", "joining", "launched", "mistakes", "networks", "quiet",
    "redaction", "run_dir", "run_lock", "run_mend", "upstream", "waiting",
}  # fmt: skip
# Who may import whom, by the first part of the module's name below vlm_dist; every part may import the leaves and itself.
ALLOWED = {
    "data": set(),
    "models": set(),
    "inputs": {"data", "models"},
    "checkpoints": set(),
    "scoring": {"data", "models"},
    "planning": {"data", "models", "inputs"},
    "checking": {"data", "models", "inputs", "planning", "scoring"},
    "training": {"data", "models", "inputs", "planning", "checkpoints", "scoring"},
    "serving": {"data", "models", "scoring"},
    "unsloth": {"data", "models"},
    "reporting": set(),
    "testing": {"models"},
    "cli": {"data", "models", "planning", "checkpoints", "scoring", "checking", "training", "serving", "reporting"},
    "__init__": {"unsloth", "training"},
    "launch": {"cli", "training"},
    "vlm_kernels": set(),
}
LONGEST_FILE = {"default": 300}
LONGEST_FUNCTION = 60


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "vlm_dist":
        return parts[1]
    return "vlm_kernels" if parts[0] == "kernels" else parts[0]


def imported(tree: ast.Module) -> set[str]:
    """Full names of the modules that a file imports anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = part_of(path)
    for name in imported(parse(path)):
        first, _, rest = name.partition(".")
        if first == "vlm_dist":
            used = rest.split(".")[0]
            if part in LEAVES:
                assert used in LEAVES, f"the leaf {part} imports vlm_dist.{rest}"
            elif used not in LEAVES and used != part:
                assert used in ALLOWED[part], f"{part} may not import vlm_dist.{rest}"
        if first == "vlm_kernels":
            users = ("models/patching.py", "models/patching_loss.py", "models/patching_nf4.py", "models/experts_product.py")
            assert part == "vlm_kernels" or str(path).endswith(users), f"{path} imports vlm_kernels"


def test_no_import_cycle():
    """Of imports anywhere: inside functions and for types too."""
    modules = {str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in FILES}

    def module_of(target: str) -> str | None:
        """Of `a.b.c`: the module itself, or the one that holds the name."""
        return target if target in modules else next((above for above in [target.rpartition(".")[0]] if above in modules), None)

    graph = {}
    for name, path in modules.items():
        graph[name] = {module for module in map(module_of, imported(parse(path))) if module}
        graph[name].discard(name)
        graph[name].discard("vlm_dist")
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"import cycle: {' -> '.join((*above, name))}"
        if name not in done:
            for used in graph[name]:
                visit(used, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    longest = LONGEST_FILE.get(str(path.relative_to(ROOT)), LONGEST_FILE["default"])
    assert len(lines) <= longest, f"{path.name} has {len(lines)} lines, {longest} are allowed; give a part of it a file of its own"
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_swallowed_errors(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(statement, ast.Pass) for statement in node.body), f"line {node.lineno}: an error is swallowed"
            assert node.type is not None, f"line {node.lineno}: bare except"


def test_only_launched_and_distributed_read_the_launchers_variables():
    words = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for path in FILES:
        if path.name in ("distributed.py", "launched.py"):
            continue
        strings = {node.value for node in ast.walk(parse(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert strings.isdisjoint(words), path


def test_import_is_quick_light_and_patches_nothing():
    code = (
        "import sys, time; t = time.perf_counter(); import vlm_dist; s = time.perf_counter() - t;"
        "heavy = {'torch', 'transformers', 'deepspeed', 'peft', 'ray', 'webdataset', 'triton', 'bitsandbytes'} & set(sys.modules);"
        "assert not heavy, heavy; print(s)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=child_environment(), check=False)
    assert result.returncode == 0, result.stderr


def test_help_imports_no_heavy_library():
    code = (
        "import sys\nfrom vlm_dist.cli.main import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=child_environment(), check=False)
    assert result.returncode == 0, result.stderr
    assert "example:" in result.stdout


def test_public_names_are_one_sorted_list():
    import vlm_dist

    assert vlm_dist.__all__ == sorted(vlm_dist.__all__)
    for name in vlm_dist.__all__:
        assert getattr(vlm_dist, name) is not None


def test_only_one_module_imports_trl():
    found = [path.name for path in FILES if any(name.split(".")[0] == "trl" for name in imported(parse(path)))]
    assert found == ["sft.py"]


def test_our_kernels_folder_is_no_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_weights_caches_or_results_of_runs_are_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    told = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if told.returncode:
        pytest.skip(f"git does not list this checkout: {told.stderr.strip()}")
    tracked = [name for name in told.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(tracked) > 400
    assert not [name for name in tracked if name.startswith(("outputs/", "runs/", "data/", ".cache/"))]
    assert not [name for name in tracked if name.endswith((".safetensors", ".bin", ".pt", ".gguf", ".tar", ".whl"))]
    assert not [name for name in tracked if (ROOT / name).stat().st_size > 400_000]
