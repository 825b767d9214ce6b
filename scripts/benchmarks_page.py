"""docs/benchmarks/README.md, made from the raw results beside it: what each says, and the command that made it.

    python scripts/benchmarks_page.py

A file that no function here reads is listed with its own `what`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
HEAD = """# Benchmarks

Every figure in these pages comes from a raw result in this folder. The table is read from the files by `python scripts/benchmarks_page.py`;
each command runs from the top of the repository and says with `--help` what can be changed.
A row that was measured on a GPU names it; all other times are those of CPU cores, bytes and registers are counted,
and what is on paper says so.

| raw result | what it says | on page |
|---|---|---|
"""
# Results that do not name their own command.
COMMANDS = {
    "cuda_branches": "scripts/cuda_branches.py --out docs/benchmarks/cuda_branches.json --page docs/gpu.md",
    "aot": ".venv/bin/python -m vlm_kernels.aot --json",
    "scaling_model": "python scripts/bench/scaling_model.py --json",
    "scaling_model_25gbps": "python scripts/bench/scaling_model.py --node-gbps 25 --gpus 16 64 --json",
    "quickstart": "scripts/quickstart.sh",
    "tests": "python scripts/testing_page.py --junit tests.xml",
}


def aot(rows: Any) -> str:
    targets, spills = len({row["target"] for row in rows}), sum(row["spills"] > 0 for row in rows)
    return f"{len(rows)} compilations of {len({row['kernel'] for row in rows})} kernels for {targets} GPUs: {spills} spill registers"


def chaos(raw: Any) -> str:
    times = sum(raw["disturbed"].values())
    cost = f"goodput {raw['goodput']:.0%}, {raw['steps_lost']} steps done twice, the same adapter"
    return f"{raw['steps']:,} steps, disturbed {times} times: {cost}"


def communication(raw: Any) -> str:
    ratios = [stage["ratio_gloo"] for stage in raw["stages"]]
    first, last = raw["stages"][0], raw["stages"][-1]
    sent = (
        f"{first['sent_by_a_rank'] / 1e6:.1f} MB a step at ZeRO {first['stage']}, {last['sent_by_a_rank'] / 1e6:.1f} MB at {last['stage']}"
    )
    return f"{raw['ranks']} ranks: a rank sends {sent}; {min(ratios):.3f} to {max(ratios):.3f} of the theory"


def cross_entropy_cpu(raw: Any) -> str:
    row = min(raw["results"], key=lambda row: row["supervised"])
    share = f"{row['time_ratio']:.2f} of the time and {row['memory_ratio']:.2f} of the memory"
    return f"with {row['supervised']:.0%} of the rows supervised, head and loss take {share}"


def decode(raw: Any) -> str:
    ratios = [row["ratio"] for row in raw["rows"] if row["way"] == "simplejpeg"]
    return f"simplejpeg decodes {min(ratios):.2f} to {max(ratios):.2f} times as many pictures a second as Pillow"


def families(raw: Any) -> str:
    rows = raw["families"].values()
    whole = sum(row["with_gradient"] == row["trainable"] for row in rows)
    merged = max(row["merged"] for row in rows)
    gradients = f"{whole} of {len(rows)} tiny architectures: a gradient for every trainable tensor"
    return f"{gradients}; merged logits within {merged:.1%} of their spread"


def experts(raw: Any) -> str:
    ours, packed, sizes = raw["ours"], raw["ours, NF4"], raw["sizes"]
    of = f"adapters on {sizes['experts']} experts, {sizes['top_k']} a token, on a CPU"
    return (
        f"{of}: {ours['cpu_ratio']:.2f} of the time and {ours['memory_ratio']:.2f} of the memory of PEFT's ParamWrapper; "
        f"on experts in NF4 {packed['cpu_ratio']:.2f} and {packed['memory_ratio']:.2f}"
    )


def longest_rows(raw: Any) -> str:
    rows = [row for row in raw["rows"] if row["name"] == "qwen2.5-vl-7b"]
    each = ", ".join(f"{row['longest_row']['rtx4090']:,} on {row['ranks']}" for row in rows)
    return f"counted, on no GPU: tokens of the longest row of Qwen2.5-VL-7B's QLoRA on RTX 4090s that share it: {each}"


def loop_overhead(raw: Any) -> str:
    return f"a step takes {raw['ratio_median']:.2f} times as long as in a bare torch loop (median of {len(raw['rounds'])} rounds)"


def memory_table(raw: Any) -> str:
    row = next(row for row in raw["rows"] if row["name"] == "qwen2.5-vl-7b")
    none, every = (row["one_row"][kind]["total"] / 1e9 for kind in ("none", "all"))
    return f"counted, on no GPU: QLoRA of Qwen2.5-VL-7B, one row of 2,048 tokens: {none:.1f} GB, {every:.1f} GB with all recomputed"


def mutation(raw: Any) -> str:
    made, stayed = (sum(row[number] for row in raw["files"]) for number in ("mutants", "survived"))
    without = sum(not mutant["why"] for row in raw["files"] for mutant in row["explained"])
    rest = f"{stayed - without} stay for a reason that is given" + (f", {without} are still to be looked at" if without else "")
    return f"{made - stayed:,} of {made:,} small faults put into {len(raw['files'])} files are found by a test; {rest}"


def quickstart(raw: Any) -> str:
    before, after = (raw["qlora"]["eval"][when]["exact_match"] for when in ("before", "after"))
    return f"held-out questions exactly right: {before:.1%} before QLoRA, {after:.1%} after; {raw['script_wall_s']} s in all"


def real_pictures(raw: Any) -> str:
    seen, grey = f"{raw['held_out']:.1%} of {raw['samples']} held-out questions right", f"{raw['no_picture']:.1%} with grey pictures"
    return f"{seen}, {grey}, chance {raw['chance']:.0%}: {raw['standard_errors_above_chance']} standard errors"


def roofline(raw: Any) -> str:
    ours, plain = (raw["cards"]["h100"][kernels] for kernels in ("auto", "off"))
    launched = f"{ours['launches']:,} operations launched a micro-batch ({plain['launches']:,} without kernels)"
    return f"counted, {raw['model']} on an H100: {launched}, {ours['roofline_ms']:.0f} ms ({plain['roofline_ms']:.0f} ms)"


def saved_activations(raw: Any) -> str:
    ratios = [row["ratio"] for row in raw["results"]]
    return f"the kernels keep {min(ratios):.2f} to {max(ratios):.2f} of the bytes for the backward pass"


def scaling_model(raw: Any) -> str:
    row = max((row for row in raw if row["stage"] == 0), key=lambda row: row["gpus"])
    return f"on paper: {row['efficiency']:.0%} efficiency on {row['gpus']:,} GPUs at ZeRO 0"


def stream(raw: Any) -> str:
    share = raw["share_of_ceiling"]
    others = f"webdataset's loader {share['webdataset']:.2f}, datasets' {share['datasets']:.2f}"
    return f"the stream reaches {share['stream']:.2f} of two bare decoding processes; {others}"


def stream_scale(raw: Any) -> str:
    index, packed = raw["index"], raw["padding"]["packed"]
    speed = f"loads in {index['load_s']} s, finds one in {index['lookup_us']} µs"
    return f"an index of {index['samples'] / 1e6:.0f} M samples {speed}; packed rows are {packed['fill']:.1%} full"


def tests(raw: Any) -> str:
    outcomes = raw["outcomes"]
    ran = f"{outcomes['tests']:,} tests, {outcomes['failures'] + outcomes['errors']} failed, {outcomes['skipped']} skipped"
    return f"{ran}: {raw['wall_s'] / 60:.1f} minutes on {raw['cores']} cores" if raw["wall_s"] else ran


def loading(raw: Any) -> str:
    shares = next(row["of_whole_copies"] for row in raw["rows"] if row["form"] == "in shares")
    return (
        f"{raw['ranks']} ranks that load {raw['checkpoint_bytes'] / 1e6:.0f} MB at ZeRO 3 hold {shares:.2f} of {raw['ranks']} whole copies"
    )


def loading_plans(raw: Any) -> str:
    row = next(row for row in raw["rows"] if row["full"])
    each = f"{row['loading'] / 1e9:.1f} GB while it loads, {row['step'] / 1e9:.1f} GB in a step"
    cards = f"{row['gpus']} x {row['gpu']} at ZeRO {row['stage']}"
    return f"all of {row['model']} on {cards}, counted: {each}; loaded whole {row['whole'] / 1e9:.0f} GB"


def report_lines(raw: Any) -> str:
    return f"the report of {raw['lines']:,} steps opens in {raw['loaded_s']:.1f} s; making it took {raw['made_s']:.0f} s"


def sequence_parallel(raw: Any) -> str:
    shares = {row["ranks"]: [] for row in raw["results"]}
    for row in raw["results"]:
        shares[row["ranks"]].append(row["of_whole"])
    told = ", ".join(f"{max(of):.3f} of {number}" for number, of in shares.items() if number > 1)
    return f"ranks that share rows keep for the backward pass, of what one rank keeps: {told}"


def sequence_wire(raw: Any) -> str:
    ratios = [row["ratio"] for row in raw["results"]]
    return f"ranks that share rows send each other {min(ratios):.3f} to {max(ratios):.3f} of what theory says, counted on the wire"


def vision_windows(raw: Any) -> str:
    shares = [share for row in raw["rows"] for share in row["share_of_time"].values()]
    return f"attention in windows takes {min(shares):.2f} to {max(shares):.2f} of the loop's time on a CPU"


def features(raw: Any) -> str:
    share, speed = raw["share_of_tower_in_flops"], raw["samples_per_s"]
    first, last, second = (speed[name] / speed["without"] for name in ("first_epoch", "last_epoch", "second_run"))
    told = f"first epoch {first:.2f}, last epoch {last:.2f}, a second run {second:.2f} times the samples/s of a run that keeps nothing"
    return f"a mini VLM whose frozen tower has {share:.0%} of the work: {told}"


def loader_processes(raw: Any) -> str:
    told = [f"{row['share_of_operations']:.2f} beside {way} ({row['samples_per_s']:.0f} samples/s)" for way, row in raw["results"].items()]
    return (
        f"small operations that a loop keeps of what it does alone, while samples are prepared flat out on another core: {', '.join(told)}"
    )


def vllm_load(raw: Any) -> str:
    return "; ".join(
        f"{row['model_type']} {'loads' if row['loaded'] else 'does not load'} in vLLM {row['versions']['vllm']}" for row in raw["results"]
    )


def cuda_branches(raw: Any) -> str:
    return f"{raw['reached']} of {len(raw['places'])} places that ask for a GPU run on a pretended card"


def video(raw: Any) -> str:
    ratios, memory = [row["ratio"] for row in raw["speed"]["clips"]], raw["memory"]
    speed = f"{min(ratios):.2f} to {max(ratios):.2f} of the speed of PyAV's own loop with the same pixels"
    return f"{speed}; {memory['clips']:,} clips decoded: memory grows by {max(0, memory['growth_bytes']) / 2**20:.1f} MiB"


def video_decoders(raw: Any) -> str:
    ratios, wrong, seek = [row["ratio"]["exact"] for row in raw["speed"]], raw["wrong_frames"], raw["seek"]["ratio"]["exact"]
    speed = f"torchcodec {raw['torchcodec']} takes {min(ratios):.2f} to {max(ratios):.2f} of our time, {seek:.2f} where it is sought"
    counts = f"{wrong['wrong']['ours']} and {wrong['wrong']['exact']} are wrong"
    failed = f"its quick mode fails at {wrong['failed_clips']['approximate']} of {wrong['clips']} clips"
    return f"{speed}; of {wrong['frames']:,} frames at an irregular rate {counts}; {failed}"


def video_twin(raw: Any) -> str:
    shown = [f"{kind} {raw['clip']['right'][kind]:.0%} (one frame {raw['one_frame']['right'][kind]:.0%})" for kind in raw["chance"]]
    return f"held-out questions about clips: {', '.join(shown)}; chance {', '.join(f'{share:.0%}' for share in raw['chance'].values())}"


READERS: dict[str, Callable[[Any], str]] = {
    "aot": aot, "chaos": chaos, "communication": communication, "communication_4": communication, "cross_entropy_cpu": cross_entropy_cpu,
    "cuda_branches": cuda_branches, "decode": decode, "experts": experts, "families": families, "features": features,
    "loader_processes": loader_processes, "loading": loading,
    "loading_plans": loading_plans, "longest_rows": longest_rows, "loop_overhead": loop_overhead, "memory_table": memory_table,
    "mutation": mutation,
    "quickstart": quickstart, "real_pictures": real_pictures, "real_pictures_python": real_pictures,
    "report_lines": report_lines, "roofline": roofline,
    "saved_activations": saved_activations, "scaling_model": scaling_model, "scaling_model_25gbps": scaling_model,
    "sequence_parallel": sequence_parallel, "sequence_wire": sequence_wire, "stream": stream,
    "stream_scale": stream_scale, "tests": tests, "video": video,
    "video_decoders": video_decoders, "video_twin": video_twin,
    "vision_windows": vision_windows, "vllm_load": vllm_load,
}  # fmt: skip


def command_of(name: str, raw: Any) -> str:
    own = raw if isinstance(raw, dict) else {}
    command = COMMANDS.get(name) or own.get("command") or own.get("environment", {}).get("command") or ""
    command = shlex.join(command) if isinstance(command, list) else command
    return f"python {command}" if command.startswith("scripts/") and ".py" in command else command


def gpus_of(raw: dict[str, Any]) -> list[str]:
    names = (gpu.get("name") if isinstance(gpu, dict) else gpu for gpu in raw.get("environment", {}).get("gpus", []))
    return sorted({str(name) for name in names})


def pages_that_quote(name: str) -> list[str]:
    return [path.name for path in sorted(FOLDER.parent.glob("*.md")) if f"benchmarks/{name}.json" in path.read_text(encoding="utf-8")]


def page() -> str:
    rows, commands = [], []
    for path in sorted(FOLDER.glob("*.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        reader = READERS.get(path.stem)
        own = raw if isinstance(raw, dict) else {}
        says = " on ".join([reader(raw) if reader else own.get("what", ""), *gpus_of(own)])
        quoted = ", ".join(f"[{name}](../{name})" for name in pages_that_quote(path.stem))
        rows.append(f"| [{path.name}]({path.name}) | {says} | {quoted} |")
        if command := command_of(path.stem, raw):
            commands.append(f"    {command}  # {path.name}")
    return HEAD + "\n".join(rows) + "\n\nThe commands that made them:\n\n" + "\n".join(commands) + "\n"


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(page(), encoding="utf-8")
    print("docs/benchmarks/README.md")
