"""No kernel reads from a buffer what another of its threads may already have overwritten: read off the PTX, where barriers show."""

from __future__ import annotations

import importlib
import re

import triton
import triton.language as tl

from vlm_kernels import aot
from vlm_kernels.common import Compilation

TARGET = "cuda:90"
REGISTER = re.compile(r"%[a-z]+\d+")


def racing_loads(ptx: str, pointers: list[str | None]) -> list[str]:
    """Global loads of a buffer, at an address that their own thread does not store to, without a barrier between them and the next
    store to that buffer.

    Args:
        pointers: of each parameter that the kernel takes at run time its name, if it is a pointer.
    """
    of: dict[str, set[str]] = {}  # register -> the buffers that its value is made of
    own = set(re.findall(r"\bst\.global\S* *\[ *(%rd\d+)", ptx))
    loads: list[tuple[set[str], str]] = []
    found = set()
    for line in ptx.splitlines():
        access = re.search(r"\b(ld|st)\.global\S* .*?\[ *(%rd\d+)", line)
        param = re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line)
        if param:
            name = pointers[int(param[2])] if int(param[2]) < len(pointers) else None
            of[param[1]] = {name} if name else set()
        elif "bar.sync" in line:
            loads.clear()
        elif access and access[1] == "ld":
            loads += [(of.get(access[2], set()), line.strip())] if access[2] not in own else []
        elif access:
            found |= {load for read, load in loads if read & of.get(access[2], set())}
        elif registers := [one for one in REGISTER.findall(line) if not one.startswith("%p")]:
            of[registers[0]] = set().union(*(of.get(one, set()) for one in registers[1:]))
    return sorted(found)


def check(case: Compilation) -> list[str]:
    runtime = [name for name in case.kernel.arg_names if name not in case.constants]
    return racing_loads(aot.compile_for(case, TARGET).asm["ptx"], [name if case.pointers[name][0] == "*" else None for name in runtime])


def test_no_kernel_reads_what_its_other_threads_overwrite():
    done = {}
    for name in aot.KERNELS:
        for case in importlib.import_module(f"vlm_kernels.{name}").compilations():
            key = (case.kernel.fn.__qualname__, name, *sorted(value for value in case.constants.values() if isinstance(value, bool)))
            if key not in done:
                done[key] = check(case)
    assert len(done) > 20 and not any(done.values()), {key: found for key, found in done.items() if found}


@triton.jit
def _late(LOGITS, LABELS, LOSS, V, BLOCK: tl.constexpr):
    """As linear_cross_entropy once was: the label's logit is read after the last barrier."""
    columns = tl.arange(0, BLOCK)
    logits = tl.load(LOGITS + columns, mask=columns < V, other=0.0)
    total = tl.sum(tl.exp(logits), axis=0)
    tl.store(LOSS, tl.log(total) - tl.load(LOGITS + tl.load(LABELS)))
    tl.store(LOGITS + columns, tl.exp(logits) / total, mask=columns < V)


def test_a_read_after_the_last_barrier_is_found():
    pointers = {"LOGITS": "*fp32", "LABELS": "*i64", "LOSS": "*fp32", "V": "i32"}
    found = check(Compilation(_late, "planted", pointers, {"BLOCK": 4096}, num_warps=8))
    assert len(found) == 1 and found[0].startswith("ld.global.b32"), found
