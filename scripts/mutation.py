"""A mutation check of the parts where a silent error costs most: mutmut makes small faults in them, and a test must fail at each.

    python scripts/mutation.py                                      # all parts: about an hour on one core
    python scripts/mutation.py vlm_dist/data/lanes.py --limit 40    # one, 40 of its mutants
    python scripts/mutation.py --again                              # only those that survived and have no reason yet

The result is docs/benchmarks/mutation.json. Words of error messages are not mutated; of the file with the slowest tests a sample with a
fixed seed is taken. Whoever lets a mutant survive writes its reason into "why" there: it is kept as long as the mutant is the same. mutmut
comes into a folder of its own and changes nothing in .venv.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "benchmarks" / "mutation.json"
MUTMUT = "mutmut==3.8.1"
SEED = 0


@dataclass
class Part:
    """A file, and the quick tests that cover it."""

    file: str
    tests: list[str]
    only: str = ""
    """Mutants that match: "FUNCTION NUMBER", then the lines taken away and put in. "": all."""
    families: list[str] = field(default_factory=lambda: ["llava", "qwen2_5_vl"])
    """Tests of every architecture run on these."""
    limit: int | None = None
    """So many of its mutants, a sample with a fixed seed; None: all."""


PARTS = [
    Part("vlm_dist/data/encode.py", ["tests/data/test_encode.py"], families=["llava", "qwen2_5_vl", "gemma3"]),
    Part("vlm_dist/data/collate.py", ["tests/data/test_collate.py"]),
    Part("vlm_dist/data/lanes.py", ["tests/data/test_lanes.py"]),
    Part("vlm_dist/models/loss.py", ["tests/models/test_loss.py", "tests/models/test_packing.py"]),
    Part("vlm_dist/training/outcome.py", ["tests/training/test_outcome.py"], only="^(count_over_ranks|Shares.metrics) "),
    Part("vlm_dist/training/train.py", ["tests/training/test_outcome.py"], only=r"\n-.*num_labels"),
    Part("vlm_dist/checkpoints/snapshot.py", ["tests/checkpoints/test_snapshot.py"]),
    Part("vlm_dist/models/merge.py", ["tests/models/test_merge.py"], families=["llava"], limit=40),
]  # fmt: skip
SETTINGS = """
[tool.mutmut]
source_paths = ["vlm_dist"]
only_mutate = ["{file}"]
do_not_mutate_patterns = ['\\braise \\w+\\(', 'Error\\($']
also_copy = ["kernels"]
process_isolation = "forkserver"
pytest_add_cli_args = ["-p", "mutation_plugin", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", "not gpu and not slow"]
pytest_add_cli_args_test_selection = {tests}
timeout_multiplier = 4.0
timeout_constant = 8.0
use_setproctitle = false
track_dependencies = false
use_git_change_detection = false
"""


def install(folder: Path) -> None:
    """mutmut and what it needs beyond our own packages, importable from here on."""
    uv = shutil.which("uv", path=f"{ROOT / '.venv' / 'uv' / 'bin'}:{os.environ['PATH']}")
    command = [uv or "uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", str(folder)]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), MUTMUT], check=True)
    sys.path.append(str(folder))


def warm() -> None:
    """What the tests import and take long for: every mutant is a fork of this process. Nothing of ours may be among it."""
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.auto.processing_auto
    import transformers.models.llava.modeling_llava
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401

    torch.set_num_threads(1)


def make_mutants(file: str) -> dict[str, str]:
    """Name -> its lines taken away and put in, of every mutant of a file. Runs where the settings are."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    made = mutate_file_contents(file, Path(file).read_text())
    lines, spans = made.code.splitlines(), made.line_span_by_function_name

    def text(name: str) -> list[str]:
        return [line.replace(name, "f") for line in lines[spans[name].start - 1 : spans[name].end]]

    found = {}
    for name in made.mutant_names:
        diff = difflib.unified_diff(text(re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)), text(name), n=0, lineterm="")
        found[name] = "\n".join(line for line in diff if not line.startswith(("---", "+++", "@@")))
    return found


def check(part: Part, folder: Path, limit: int | None, only: set[str] | None) -> None:
    """Run mutmut on one part, in a process of its own; the result is folder/result.json."""
    folder.mkdir()
    for name in ("vlm_dist", "kernels", "tests"):
        (folder / name).symlink_to(ROOT / name)
    settings = SETTINGS.format(file=part.file, tests=json.dumps(part.tests))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
    os.environ.update(MUTATION_FAMILIES=" ".join(part.families), MUTATION_CHECKPOINTS=str(folder.parent / "checkpoints"))
    os.chdir(folder)
    from mutmut.__main__ import _run  # reads the settings
    from mutmut.stats import status_by_exit_code

    diffs = make_mutants(part.file)
    fitting = [name for name, diff in diffs.items() if re.search(part.only, f"{readable(name)}\n{diff}")]
    chosen = sorted(random.Random(SEED).sample(fitting, min(limit or len(fitting), len(fitting))))
    if only is not None:
        chosen = [name for name in fitting if diffs[name] in only]
    module = part.file.removesuffix(".py").replace("/", ".")
    if chosen:
        _run([f"{module}.{name}" for name in chosen], 1)
    codes = json.loads((folder / "mutants" / f"{part.file}.meta").read_text())["exit_code_by_key"] if chosen else {}
    states = {name: status_by_exit_code[codes[f"{module}.{name}"]] for name in chosen}
    survivors = [{"mutant": readable(name), "diff": diffs[name]} for name in chosen if states[name] in ("survived", "no tests")]
    result = {"made": len(fitting), "mutants": len(chosen), "survivors": survivors}
    result["timeout"] = sum(state == "timeout" for state in states.values())
    (folder / "result.json").write_text(json.dumps(result))


def readable(name: str) -> str:
    """xǁOrderǁdraw__mutmut_3 -> Order.draw 3"""
    function, _, number = name.removeprefix("x").partition("__mutmut_")
    return f"{function.strip('ǁ').removeprefix('_').replace('ǁ', '.')} {number}"


def recorded(part: Part, result: dict[str, Any], before: dict[str, Any] | None, again: bool) -> dict[str, Any]:
    """The part's entry in mutation.json; reasons, and with `again` the numbers too, go on from the entry before."""
    reasons = {row["diff"]: row["why"] for row in (before or {}).get("explained", [])}
    survivors = [{**row, "why": reasons.get(row["diff"], "")} for row in result["survivors"]]
    row = {"file": part.file, "tests": part.tests, "families": part.families, "made": result["made"]}
    mutants, timeout = result["mutants"], result["timeout"]
    if again and before is not None:
        mutants, timeout = before["mutants"], before["timeout"] + timeout
        survivors += [row for row in before["explained"] if row["why"] and row not in survivors]
    killed = mutants - len(survivors) - timeout
    return {**row, "mutants": mutants, "killed": killed, "survived": len(survivors), "timeout": timeout, "explained": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help=f"of {', '.join(part.file for part in PARTS)} (default: all)")
    parser.add_argument("--limit", type=int, help="mutants a file at most (default: all, 40 of the slowest file)")
    parser.add_argument("--again", action="store_true", help="only the mutants that survived last time and have no reason yet")
    arguments = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONDONTWRITEBYTECODE="1")
    before = {row["file"]: row for row in json.loads(OUT.read_text())["files"]} if OUT.exists() else {}
    rows = dict(before)
    with tempfile.TemporaryDirectory(prefix="mutation-") as place:
        install(Path(place) / "mutmut")
        warm()
        for number, part in enumerate(part for part in PARTS if not arguments.files or part.file in arguments.files):
            print(f"\n{part.file}", flush=True)
            only = None
            if arguments.again and part.file in before:
                only = {row["diff"] for row in before[part.file]["explained"] if not row["why"]}
            folder = Path(place) / str(number)
            process = multiprocessing.get_context("fork").Process(target=check, args=(part, folder, arguments.limit or part.limit, only))
            process.start()
            process.join()
            if not (folder / "result.json").exists():
                raise SystemExit(f"{part.file}: mutmut ended with {process.exitcode}; its words are above")
            rows[part.file] = recorded(part, json.loads((folder / "result.json").read_text()), before.get(part.file), arguments.again)
            save([rows[part.file] for part in PARTS if part.file in rows])
    for row in rows.values():
        print(f"{row['file']}: {row['killed']} of {row['mutants']} killed, {row['timeout']} timed out, {row['survived']} survived")
        for mutant in row["explained"]:
            if not mutant["why"]:
                print(f"  no reason yet: {mutant['mutant']}\n    " + mutant["diff"].replace("\n", "\n    "))


def save(files: list[dict[str, Any]]) -> None:
    environment = {"python": sys.version.split()[0], "mutmut": MUTMUT.rpartition("=")[2], "cpus": os.cpu_count()}
    content = {"environment": environment, "command": "scripts/mutation.py", "seed": SEED, "files": files}
    OUT.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
