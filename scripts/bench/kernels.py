"""Every kernel beside PyTorch, torch.compile, Liger-Kernel and bitsandbytes, in one run on one GPU.

    python scripts/bench/kernels.py --out docs/benchmarks/kernels_GPU.json
    python scripts/bench/kernels.py --dry-run            # here, on a CPU: small sizes, once each, no claim

For each contender: the median of CUDA-event times of a CUDA graph of it (so that the card's time is measured, not Python's), over buffers
that are rotated, so that the L2 cache does not hold them; the bytes that the computation cannot avoid (from the kernels' headers) over that
time, as a share of the copy bandwidth measured in the same run; and `host_us`, how long the host is busy with a call. What asks the card
in between (`loop`, linear_cross_entropy) cannot be put into a graph, and is timed as it is.
linear_cross_entropy is compared by time and by peak memory, at 10 %, 50 % and 100 % supervised rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # there this file would hide Hugging Face's package `kernels`

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import vlm_kernels
from vlm_dist import distributed
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import write_json
from vlm_kernels import reference

ASKING = ("loop",)
"""Contenders that ask the card how much there is."""
HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None


@dataclass
class Case:
    """One computation at one size: contenders take the same inputs; `bytes_moved` is what none can avoid, forward and backward."""

    name: str
    shape: str
    inputs: Callable[[], tuple]
    contenders: dict[str, Callable]
    bytes_moved: int
    backward: bool = True


class Clock:
    """Times a call on the device; on a CPU by the wall, for the dry run."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds

    def host_us(self, call: Callable, inputs: tuple) -> float:
        """How long the host is busy with a call that has been made before."""
        times = []
        for _ in range(self.rounds):
            begun = time.perf_counter()
            call(*inputs)
            times.append(1e6 * (time.perf_counter() - begun))
            if self.device == "cuda":
                torch.cuda.synchronize()
        return statistics.median(times)

    def graphs_ms(self, call: Callable, buffers: list[tuple]) -> float:
        """`median_ms` of a CUDA graph of the call for each of the inputs."""
        if self.device == "cpu":
            return self.median_ms(call, buffers)
        graphs = []
        for inputs in buffers:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                call(*inputs)
            torch.cuda.current_stream().wait_stream(beside)
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                call(*inputs)
        return self.median_ms(lambda graph: graph.replay(), [(graph,) for graph in graphs])

    def median_ms(self, call: Callable, buffers: list[tuple]) -> float:
        for inputs in buffers[:2]:
            call(*inputs)
        times = []
        for number in range(self.rounds):
            inputs = buffers[number % len(buffers)]
            if self.device == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call(*inputs)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            else:
                begun = time.perf_counter()
                call(*inputs)
                times.append(1000 * (time.perf_counter() - begun))
        return statistics.median(times)


def with_backward(function: Callable) -> Callable:
    """Forward and backward with a ready gradient."""

    def call(*inputs: Any) -> None:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor):
                tensor.grad = None

    return call


def random(*shape: int, device: str, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


def liger_functions(device: str) -> dict[str, Callable]:
    """Liger-Kernel's ops by our names; none where it is not installed, and none on a CPU, where Triton starts nothing."""
    if not HAS_LIGER or device == "cpu":
        return {}
    from liger_kernel.ops import geglu, layer_norm, rms_norm, rope, swiglu

    return {
        "rms_norm": lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
        "layer_norm": lambda x, w, b: layer_norm.LigerLayerNormFunction.apply(x, w, b, 1e-5),
        "swiglu": swiglu.LigerSiLUMulFunction.apply,
        "geglu": geglu.LigerGELUMulFunction.apply,
        "rope": lambda q, k, cos, sin: rope.LigerRopeFunction.apply(q, k, cos, sin),
    }


def cases(device: str, tokens: int, small: bool, compiled: bool) -> Iterator[Case]:
    liger = liger_functions(device)

    def contenders(name: str, ours: Callable, plain: Callable) -> dict[str, Callable]:
        found = {"ours": ours, "torch": plain}
        if compiled:
            found["torch.compile"] = torch.compile(plain)
        return found | ({"liger": liger[name]} if name in liger else {})

    for hidden in (64,) if small else (2048, 3584, 4096, 8192):
        size = 2 * tokens * hidden
        yield Case(
            "rms_norm", f"{tokens} x {hidden}",
            lambda hidden=hidden: (random(tokens, hidden, device=device, grad=True), random(hidden, device=device)),
            contenders("rms_norm", lambda x, w: vlm_kernels.rms_norm(x, w, 1e-6), lambda x, w: reference.rms_norm(x, w, 1e-6)), 5 * size,
        )  # fmt: skip
    for width in (64,) if small else (1024, 1280):
        yield Case(
            "layer_norm", f"{tokens} x {width}",
            lambda width=width: (random(tokens, width, device=device, grad=True), *(random(width, device=device) for _ in range(2))),
            contenders("layer_norm", vlm_kernels.layer_norm, lambda x, w, b: reference.layer_norm(x, w, b, 1e-5)), 5 * 2 * tokens * width,
        )  # fmt: skip
    for name, ours, plain in (("swiglu", vlm_kernels.swiglu, reference.swiglu), ("geglu", vlm_kernels.geglu, reference.geglu)):
        for width in (64,) if small else (8192, 18944):
            yield Case(
                name, f"{tokens} x {width}", lambda width=width: tuple(random(tokens, width, device=device, grad=True) for _ in range(2)),
                contenders(name, ours, plain), 8 * 2 * tokens * width,
            )  # fmt: skip
    for heads, key_heads, head_dim in ((2, 1, 8),) if small else ((28, 4, 128), (32, 8, 128)):

        def make(heads=heads, key_heads=key_heads, head_dim=head_dim) -> tuple:
            q, k = (random(1, tokens, h, head_dim, device=device).transpose(1, 2).requires_grad_(True) for h in (heads, key_heads))
            half = torch.rand((1, tokens, head_dim // 2), device=device)
            return q, k, *(torch.cat((f(half), f(half)), -1).bfloat16() for f in (torch.cos, torch.sin))

        size = 2 * tokens * (heads + key_heads) * head_dim
        yield Case(
            "rope", f"{heads} + {key_heads} heads of {head_dim}", make, contenders("rope", vlm_kernels.rope, reference.rope), 4 * size
        )
    yield from nf4_cases(device, small)
    yield from experts_cases(device, tokens, small)


def experts_cases(device: str, tokens: int, small: bool) -> Iterator[Case]:
    """Frozen experts of Qwen3-VL-30B-A3B, 8 for a token, all hit alike."""
    groups, top_k = (4, 2) if small else (128, 8)
    for inputs, outputs in ((64, 32),) if small else ((2048, 1536), (768, 2048)):
        rows = tokens * top_k

        def make(rows=rows, inputs=inputs, outputs=outputs) -> tuple:
            counts = torch.full((groups,), rows // groups, device=device)
            return random(rows, inputs, device=device, grad=True), random(groups, outputs, inputs, device=device), counts

        def by_torch(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))

        moved = 2 * 2 * (rows * (inputs + outputs) + groups * inputs * outputs)
        found = {"ours": vlm_kernels.grouped_linear, "grouped_mm": by_torch, "loop": reference.grouped_linear}
        yield Case("grouped_linear", f"{rows} rows, {groups} of {inputs} to {outputs}", make, found, moved)


def nf4_cases(device: str, small: bool) -> Iterator[Case]:
    from bitsandbytes import functional

    for rows, columns in ((64, 64),) if small else ((4096, 4096), (18944, 3584)):

        def make(rows=rows, columns=columns) -> tuple:
            return functional.quantize_4bit(random(rows, columns, device=device), compress_statistics=True, quant_type="nf4")

        moved = int((0.516 + 2) * rows * columns)
        found = {"ours": vlm_kernels.nf4_dequantize, "bitsandbytes": functional.dequantize_4bit}
        yield Case("nf4_dequantize", f"{rows} x {columns}", make, found, moved, backward=False)
        for tokens in (1, 16) if not small else (2,):

            def with_input(make=make, tokens=tokens, columns=columns) -> tuple:
                return random(tokens, columns, device=device), *make()

            import bitsandbytes

            found = {
                "ours": vlm_kernels.nf4_lora_linear,
                "bitsandbytes": lambda x, codes, state: bitsandbytes.matmul_4bit(x, codes, quant_state=state),
            }
            moved = int(0.516 * rows * columns) + 2 * tokens * (rows + columns)
            yield Case("nf4_lora_linear", f"{tokens} tokens, {rows} x {columns}", with_input, found, moved, backward=False)


def cross_entropy(device: str, tokens: int, small: bool, clock: Clock) -> Iterator[dict[str, Any]]:
    hidden, vocabulary = (16, 97) if small else (3584, 151_936)
    weight = random(vocabulary, hidden, device=device) * 0.02

    def plain(h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((h @ weight.T).float(), labels, ignore_index=-100, reduction="sum")

    found: dict[str, Callable] = {"ours": lambda h, labels: vlm_kernels.linear_cross_entropy(h, weight, labels)[0], "torch": plain}
    if HAS_LIGER and device == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = lambda h, labels: liger(weight, h, labels)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut_cross_entropy"] = lambda h, labels: cut(h, weight, labels, reduction="sum")
    for supervised in (0.1, 0.5, 1.0):
        labels = torch.randint(vocabulary, (tokens,), device=device)
        labels[torch.rand(tokens, device=device) >= supervised] = -100
        h = random(tokens, hidden, device=device, grad=True)
        row: dict[str, Any] = {
            "kernel": "linear_cross_entropy",
            "shape": f"{tokens} x {hidden} x {vocabulary}, {supervised:.0%} supervised",
        }
        for name, call in found.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            milliseconds = clock.median_ms(with_backward(call), [(h, labels)])
            row[name] = {"ms": milliseconds}
            if device == "cuda":
                row[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        yield row


def copy_bandwidth(device: str, clock: Clock, small: bool) -> float:
    """Bytes a second that a copy moves, read and written."""
    size = 1 << (16 if small else 30)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / clock.median_ms(lambda: target.copy_(source), [()]) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes seconds for each")
    parser.add_argument("--dry-run", action="store_true", help="small sizes, on whatever is here")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.dry_run:
        parser.error("no CUDA GPU here; --dry-run goes through every case on the CPU")
    small = arguments.dry_run
    clock = Clock(device, 3 if small else arguments.rounds)
    bandwidth = copy_bandwidth(device, clock, small)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for case in cases(device, 8 if small else arguments.tokens, small, device == "cuda" and not arguments.no_compile):
        row: dict[str, Any] = {"kernel": case.name, "shape": case.shape, "bytes": case.bytes_moved}
        buffers = [case.inputs() for _ in range(2 if small else 4)]
        for name, call in case.contenders.items():
            whole = with_backward(call) if case.backward else call
            milliseconds = clock.median_ms(whole, buffers) if name in ASKING else clock.graphs_ms(whole, buffers)
            found = {"ms": milliseconds, "of_copy_bandwidth": case.bytes_moved / (milliseconds / 1000) / bandwidth}
            row[name] = {**found, "host_us": clock.host_us(whole, buffers[0])}
        rows.append(row)
        print_row(row)
    for row in cross_entropy(device, 8 if small else arguments.tokens, small, clock):
        rows.append(row)
        print_row(row)
    if arguments.out:
        environment = describe_environment(distributed.start())
        write_json(arguments.out, {"environment": environment, "copy_bytes_per_s": bandwidth, "dry_run": small, "results": rows})


def print_row(row: dict[str, Any]) -> None:
    found = {name: value for name, value in row.items() if isinstance(value, dict)}
    print(f"{row['kernel']:20} {row['shape']:36} " + "  ".join(f"{name} {value['ms']:.3f} ms" for name, value in found.items()))


if __name__ == "__main__":
    main()
