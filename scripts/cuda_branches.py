"""Which of the places that ask for a GPU, or call torch.cuda, some test reaches on a card that is not there (tests/pretended).

    python scripts/cuda_branches.py                                          # a line a place, reached or not
    python scripts/cuda_branches.py --out docs/benchmarks/cuda_branches.json --page docs/gpu.md

A place is an `if`, a conditional expression or an operand of `and` / `or` whose test names the GPU in any of its spellings, or a
statement that calls torch.cuda. It is reached if its line ran on the card; an `if`, if the first line of the card's side ran.
Fails (exit code 1) where a place is neither reached nor excused below.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("vlm_dist", "kernels", "launch")
SPELLED = {"is_cuda", "on_gpu", "_on_gpu", "use_gpu", "has_bfloat16", "runs_kernel", "by_gpu"}
BEGIN, END = "<!-- made by scripts/cuda_branches.py -->", "<!-- end of what scripts/cuda_branches.py made -->"
EXCUSED: dict[str, dict[str, list[str]]] = {  # file -> why no test on this machine reaches it -> the places, whole
    "kernels/vlm_kernels/aot.py": {
        "a target to compile for: tests/kernels/test_aot.py runs it": [
            "GPUTarget('cuda', int(architecture), 32) if backend == 'cuda' else GPUTarget('hip', architecture, 64)",
            "_cuda_resources(compiled.asm['cubin']) if backend == 'cuda' else _hip_resources(compiled.asm['amdgcn'])",
            "_cuda_widths(compiled.asm['ptx']) if backend == 'cuda' else _hip_widths(compiled.asm['amdgcn'])",
            "int(target[5:]) if target.startswith('cuda:') else AMPERE",
        ],
    },
    "kernels/vlm_kernels/geglu.py": {
        "a whole MLP of Gemma's: tests/kernels/test_interpreter.py runs it": [
            "runs_kernel(gate)",
        ],
    },
    "vlm_dist/cards.py": {
        "a card that CUDA does not start on: tests/test_cards.py runs it": [
            "torch.cuda.init()",
        ],
    },
    "vlm_dist/checking/doctor.py": {
        "two cards": [
            "a != b and (not torch.cuda.can_device_access_peer(a, b))",
        ],
    },
    "vlm_dist/planning/costs.py": {
        "a plan for any card, on fake tensors: tests/planning/test_count.py runs it": [
            "'cuda' if shapes.on_gpu else 'cpu'",
            "packed and shapes.on_gpu",
        ],
    },
    "vlm_dist/planning/memory.py": {
        "a plan for any card, on fake tensors: tests/planning/test_count.py runs it": [
            "CONTEXT if on_gpu else 0",
            "on_gpu",
        ],
    },
    "vlm_dist/planning/shapes.py": {
        "a plan for any card, on fake tensors: tests/planning/test_count.py runs it": [
            "on_gpu",
            "self.on_gpu and func in IN_FLOAT32 and torch.is_autocast_enabled('cpu')",
        ],
    },
    "vlm_dist/planning/twin.py": {
        "a plan for any card, on fake tensors: tests/planning/test_count.py runs it": [
            "'all' if config.kernels == 'auto' and shapes.on_gpu else config.kernels",
        ],
    },
    "vlm_dist/training/on_ray.py": {
        "a Ray cluster that has GPUs": [
            "'cpu:gloo,cuda:nccl' if workers.use_gpu else 'gloo'",
        ],
    },
    "vlm_dist/training/ray_cluster.py": {
        "a Ray cluster that has GPUs": [
            "'start nodes with GPUs, or ray.use_gpu=false' if workers.use_gpu else 'lower ray.cpus_per_worker'",
            "config.ray.workers or max(1, gpus if use_gpu else 1)",
            "gpus > 0 if config.ray.use_gpu is None else config.ray.use_gpu",
            "{'GPU': 1.0} if use_gpu else {}",
        ],
    },
    "vlm_dist/unsloth/sft.py": {
        "a card that only emulates bfloat16: tests/unsloth/test_trl_workflow.py runs it": [
            "torch.cuda.get_device_name()",
        ],
    },
}


@dataclass
class Place:
    """Somewhere that asks for a GPU."""

    file: str
    line: int
    source: str
    lines: list[int]
    """One of them must have run."""
    reached: list[str]
    """By these scenarios of tests/pretended/scenarios.py."""
    excuse: str = ""


def names_gpu(test: ast.AST) -> bool:
    for node in ast.walk(test):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda"):
            return True
        if (isinstance(node, ast.Attribute) and node.attr in SPELLED) or (isinstance(node, ast.Name) and node.id in SPELLED):
            return True
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda."):
            return True
    return False


def places_of(path: Path) -> list[Place]:
    tree = ast.parse(path.read_text())
    file, found = path.relative_to(ROOT).as_posix(), {}

    def add(node: ast.expr | ast.stmt, source: ast.AST, lines: list[int]) -> None:
        found.setdefault(node.lineno, Place(file, node.lineno, ast.unparse(source)[:110], lines, []))

    for node in ast.walk(tree):
        if isinstance(node, ast.If) and names_gpu(node.test):
            away = isinstance(node.test, ast.UnaryOp) or any(isinstance(part, ast.NotEq) for part in ast.walk(node.test))
            add(node, node.test, [node.lineno] if away else [node.body[0].lineno])
        elif isinstance(node, (ast.IfExp, ast.BoolOp)) and names_gpu(node.test if isinstance(node, ast.IfExp) else node):
            add(node, node, list(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda."):
            add(node, node, [node.lineno])
    return list(found.values())


def all_places() -> list[Place]:
    found = [place for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) for place in places_of(path)]
    for place in found:
        place.excuse = next((why for why, sources in EXCUSED.get(place.file, {}).items() if place.source in sources), "")
    return sorted(found, key=lambda place: (place.file, place.line))


def run_scenarios() -> dict:
    """What ran where; see tests/pretended/scenarios.py.

    Raises:
        subprocess.CalledProcessError: a scenario failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.pretended.scenarios", folder]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return json.loads((Path(folder) / "ran.json").read_text())


def reach(ran: dict[str, dict[str, list[int]]]) -> list[Place]:
    found = all_places()
    for place in found:
        place.reached = [name for name, files in ran.items() if set(place.lines) & set(files.get(place.file, ()))]
    return found


def as_text(places: list[Place]) -> str:
    """The share, and what is not reached with the reason."""
    reached = [place for place in places if place.reached]
    head = f"{len(reached)} of {len(places)} places that ask for a GPU or call torch.cuda run in CI on a pretended card"
    left = {f"| `{place.file}` | `{place.source}` | {place.excuse or 'not reached'} |" for place in places if not place.reached}
    return "\n".join([f"{head} ([cuda_branches.json](benchmarks/cuda_branches.json)). The others:", "",
                      "| file | asks | needs |", "|---|---|---|", *sorted(left)])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ran", type=Path, help="a ran.json that tests.pretended.scenarios wrote; else they run now")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    ran = json.loads(arguments.ran.read_text()) if arguments.ran else run_scenarios()
    places = reach(ran["lines"])
    for place in places:
        print(f"{place.file}:{place.line:<5} {', '.join(place.reached) or place.excuse or 'NOT REACHED':40} {place.source}")
    missed = [place for place in places if not place.reached and not place.excuse]
    if arguments.out:
        rows = [{name: value for name, value in asdict(place).items() if name not in ("line", "lines")} for place in places]
        arguments.out.write_text(json.dumps({"reached": sum(bool(p.reached) for p in places), "places": rows}, indent=1) + "\n")
    if arguments.page:
        text = arguments.page.read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        arguments.page.write_text(f"{before}{BEGIN}\n\n{as_text(places)}\n\n{END}{after}")
    print(f"{sum(bool(p.reached) for p in places)} of {len(places)} reached, {len(missed)} neither reached nor excused", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
