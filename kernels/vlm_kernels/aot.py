"""Compile every kernel ahead of time, for GPUs that are not here, at the block sizes that its launcher picks for real models.

    python -m vlm_kernels.aot                    # one line a compilation
    python -m vlm_kernels.aot --json             # the same as JSON
    python -m vlm_kernels.aot --markdown         # a table by kernel and target
    python -m vlm_kernels.aot --targets cuda:89 --kernels rms_norm swiglu

Fails (exit code 1) when a kernel spills registers, uses a stack, or wants more shared memory than the GPU has for a block.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlm_kernels.common import AMPERE, INTERPRETED, Compilation

OTHERS = ("aot", "common", "launch", "nf4_gated_mlp", "nf4_lora_group", "operation", "reference")  # the two are of other files' kernels
KERNELS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py") if path.stem not in OTHERS))
"""One file is one kernel."""
KIB = 1024
SHARED_LIMIT = {  # bytes of shared memory that one block may use; CUDA C++ Programming Guide, and AMD's CDNA3 ISA guide for gfx942
    "cuda:70": 96 * KIB, "cuda:75": 64 * KIB,
    "cuda:80": 163 * KIB, "cuda:86": 99 * KIB, "cuda:89": 99 * KIB, "cuda:90": 227 * KIB, "cuda:100": 227 * KIB, "cuda:120": 99 * KIB,
    "hip:gfx942": 64 * KIB,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One compilation. registers: a thread's; spills and stack: bytes a thread; shared: bytes a block; loads, stores: bits -> how often."""

    kernel: str
    target: str
    shape: str
    constants: dict[str, Any]
    num_warps: int
    registers: int
    spills: int
    stack: int
    shared: int
    loads: dict[str, int]
    stores: dict[str, int]

    @property
    def problem(self) -> str | None:
        """What makes this compilation unfit; None if nothing does."""
        if self.spills or self.stack:
            return f"{self.spills} bytes spilled, {self.stack} bytes of stack"
        if self.shared > SHARED_LIMIT[self.target]:
            return f"{self.shared:,} bytes of shared memory; {self.target} has {SHARED_LIMIT[self.target]:,} for a block"
        return None


def compile_all(targets: Sequence[str] = tuple(SHARED_LIMIT), kernels: Sequence[str] = KERNELS) -> Iterator[Row]:
    """Compile; equal compilations of different shapes are made once and reported for each. What a launcher does not start on a target is
    left out."""
    for target in targets:
        done: dict[str, Row] = {}
        capability = int(target[5:]) if target.startswith("cuda:") else AMPERE
        for name in kernels:
            for case in importlib.import_module(f"vlm_kernels.{name}").compilations():
                if capability < case.least:
                    continue
                if capability < AMPERE:  # has no bfloat16, so models are in float16 there
                    case = replace(case, pointers={argument: kind.replace("bf16", "fp16") for argument, kind in case.pointers.items()})
                key = repr((case.kernel.fn.__qualname__, name, case.pointers, case.constants, case.num_warps, case.options))
                if key not in done:
                    done[key] = compile_one(name, case, target)
                yield Row(**{**asdict(done[key]), "shape": case.shape})


def compile_for(case: Compilation, target: str) -> Any:
    """Triton's compiled kernel for one target, e.g. "cuda:89" or "hip:gfx942", with its `asm`."""
    backend, _, architecture = target.partition(":")
    gpu = GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget("hip", architecture, 64)
    signature = {**case.pointers, **dict.fromkeys(case.constants, "constexpr")}
    ordered = {argument: signature[argument] for argument in case.kernel.arg_names}
    # tensors' addresses, strides and sizes are multiples of 16 in real models; the launcher specialises on that, and so do we
    free = {"M", "T", "seed"}
    places = [i for i, (argument, kind) in enumerate(ordered.items()) if kind != "constexpr" and kind[0] in "*i" and argument not in free]
    source_attributes: Any = {(i,): [["tt.divisibility", 16]] for i in places}
    source = ASTSource(fn=case.kernel, signature=ordered, constexprs=case.constants, attrs=source_attributes)
    return triton.compile(source, target=gpu, options={"num_warps": case.num_warps, **case.options})


def compile_one(name: str, case: Compilation, target: str) -> Row:
    """Compile one kernel for one target and read off what it uses."""
    backend, compiled = target.partition(":")[0], compile_for(case, target)
    used = _cuda_resources(compiled.asm["cubin"]) if backend == "cuda" else _hip_resources(compiled.asm["amdgcn"])
    widths = _cuda_widths(compiled.asm["ptx"]) if backend == "cuda" else _hip_widths(compiled.asm["amdgcn"])
    kernel = f"{name}.{case.kernel.fn.__name__.strip('_').removesuffix('_kernel').replace('kernel', 'forward')}"
    return Row(kernel, target, case.shape, case.constants, case.num_warps, *used, compiled.metadata.shared, *widths)


def _cuda_resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, spilled bytes, stack) by NVIDIA's own tool, which comes in Triton's wheel. Spilled registers lie in local memory, which
    the tool shows as stack and local."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "LOCAL", "STACK"))  # pyright: ignore


def _hip_resources(assembly: str) -> tuple[int, int, int]:
    found = {
        key: int(value)
        for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"]), found["private_segment_fixed_size"]


def _cuda_widths(ptx: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bits of each global load and store, e.g. `ld.global.v4.b32`: 128."""

    def count(kind: str) -> dict[str, int]:
        found = re.findall(rf"\b{kind}\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)", ptx)
        counts = Counter(int(lanes or 1) * int(bits) for lanes, bits in found)
        if kind == "ld":  # straight into shared memory
            counts.update(
                8 * int(size, 0)
                for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", ptx)
            )
        return _sorted(counts)

    return count("ld"), count("st")


def _hip_widths(assembly: str) -> tuple[dict[str, int], dict[str, int]]:
    bits = {
        "ubyte": 8,
        "sbyte": 8,
        "byte": 8,
        "ushort": 16,
        "sshort": 16,
        "short": 16,
        "dword": 32,
        "dwordx2": 64,
        "dwordx3": 96,
        "dwordx4": 128,
    }

    def count(kind: str) -> dict[str, int]:
        return _sorted(
            Counter(bits[width] for width in re.findall(rf"\b(?:global|buffer)_{kind}_([a-z]+(?:x\d)?)\b", assembly) if width in bits)
        )

    return count("load"), count("store")


def _sorted(counts: Counter[int]) -> dict[str, int]:
    return {str(bits): counts[bits] for bits in sorted(counts)}


def as_table(rows: Sequence[Row], targets: Sequence[str]) -> str:
    """Registers of a thread and shared memory of a block; equal compilations of several shapes share a line."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(repr((row.kernel, row.constants, row.num_warps)), {"row": row, "shapes": []})
        line["shapes"] += [row.shape] if row.shape not in line["shapes"] else []
        line[row.target] = f"{row.registers} / {row.shared / KIB:.3g}"
    head = ["kernel", "for", "constants", "warps", *targets]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines.values():
        row = line["row"]
        constants = ", ".join(f"{name} {value}" for name, value in row.constants.items())
        cells = [row.kernel, "; ".join(line["shapes"]), constants, str(row.num_warps), *(line.get(target, "") for target in targets)]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m vlm_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets", nargs="+", choices=tuple(SHARED_LIMIT), default=list(SHARED_LIMIT), metavar="TARGET", help="e.g. cuda:89"
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL")
    parser.add_argument("--json", action="store_true", help="one JSON list")
    parser.add_argument("--markdown", action="store_true", help="one table")
    arguments = parser.parse_args(argv)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set; compiling needs Triton's compiler: unset it")
    rows = list(compile_all(arguments.targets, arguments.kernels))
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif arguments.markdown:
        print(as_table(rows, arguments.targets))
    else:
        for row in rows:
            print(f"{row.kernel:32} {row.target:10} {row.shape:28} {row.registers:4} registers {row.shared:7,} B shared  loads {row.loads}")
    bad = [row for row in rows if row.problem]
    for row in bad:
        print(f"{row.kernel} for {row.target}, {row.shape}, {row.constants}: {row.problem}", file=sys.stderr)
    print(f"{len(rows)} compilations, {len(bad)} unfit", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
