"""`vlm-dist plan`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import add_config, new_parser
from vlm_dist.cli.plan_profile import show_profile
from vlm_dist.errors import ConfigError, MachineError

DEFAULT = "rtx4090"


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "plan",
        "Count, before training, the memory and time that a configuration needs on a GPU, and what else would fit. Reads no weights.",
        "vlm-dist plan configs/qwen2_5_vl_7b_qlora.yaml --gpu rtx4090 --auto",
    )
    add_config(parser)
    parser.add_argument("--gpu", metavar="NAME", help=f"a card, such as rtx4090, a100, h100 (default: this machine's, else {DEFAULT})")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="how many of them (default 1)")
    parser.add_argument("--size", metavar="WxH", help="assume pictures of this size (default: measure data.train)")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="with --size: so many a row (default 1)")
    parser.add_argument("--quick", action="store_true", help="only the configuration's own settings, not what else would fit")
    auto = "write a copy of CONFIG with the quickest settings that fit; a row that fits no card alone is shared by some of --gpus"
    parser.add_argument("--auto", action="store_true", help=auto)
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --auto: where to (default: CONFIG's name with .planned.yaml)")
    parser.add_argument("--profile", action="store_true", help="where the time, launches and kept bytes of a micro-batch go, by part")
    parser.add_argument("--against", choices=("off", "auto", "all"), help="with --profile: beside these kernels (off: PEFT)")
    parser.add_argument("--json", action="store_true", help="print JSON; bytes, FLOPs and seconds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from vlm_dist.config_load import load_config, write_changed
    from vlm_dist.planning.gpus import find_gpu, this_gpu
    from vlm_dist.planning.plan import best_of, make_plan, open_planner, settings_of
    from vlm_dist.planning.sharing import open_sharing_planner, plan_shared

    if arguments.gpus < 1 or arguments.pictures < 0:
        raise ConfigError("plan: expected --gpus of 1 or more and --pictures of 0 or more")
    if arguments.auto and arguments.quick:
        raise ConfigError("plan: --auto looks for other settings, --quick leaves them out; give one of the two")
    if arguments.auto and arguments.profile:
        raise ConfigError("plan: --auto looks for other settings, --profile looks at the configuration's own; give one of the two")
    if arguments.against is not None and not arguments.profile:
        raise ConfigError("plan: --against is of --profile; give both")
    config = load_config(arguments.config, arguments.overrides)
    gpu = find_gpu(arguments.gpu) if arguments.gpu else this_gpu() or find_gpu(DEFAULT)
    out = arguments.out or Path(arguments.config).with_suffix(".planned.yaml")
    if arguments.auto and out.exists():
        raise ConfigError(f"plan --auto: '{out}' exists already; give another file with --out")
    opened = open_sharing_planner if arguments.auto else open_planner
    with opened(config, gpu, arguments.gpus, size=_size(arguments.size), pictures=arguments.pictures, note=_note(arguments)) as planner:
        plan = make_plan(planner, others=not (arguments.quick or arguments.profile))
        if arguments.profile:
            plan |= _profiles(planner, arguments)
        if arguments.auto:
            plan = plan_shared(planner, plan)
    if arguments.json:
        print(json.dumps(plan, indent=1))
    elif arguments.profile:
        show_profile(plan)
    else:
        _show(plan)
    if arguments.auto:
        best = settings_of(best_of(plan))
        write_changed(Path(arguments.config), out, best, arguments.overrides)
        chosen = ", ".join(f"{key}: {json.dumps(value)}" for key, value in best.items())
        print(f"written: {out} ({chosen})", file=sys.stderr if arguments.json else sys.stdout)
    elif not plan["own"]["fits"]:
        return MachineError.exit_code
    return 0


def _profiles(planner: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from vlm_dist.config_load import load_config
    from vlm_dist.planning.profile import profile

    found = {"profile": profile(planner)}
    if arguments.against is not None:
        other = load_config(arguments.config, [*arguments.overrides, f"kernels={arguments.against}"]).kernels
        found["against"] = {"kernels": arguments.against, **profile(planner, planner.config.model_copy(update={"kernels": other}))}
    return found


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ConfigError(f"--size: found '{text}'; expected WIDTHxHEIGHT in pixels, such as 1280x960")
    return int(match[1]), int(match[2])


def _note(arguments: argparse.Namespace) -> Any:
    return (lambda _: None) if arguments.json else (lambda text: print(text, file=sys.stderr, flush=True))


def _show(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    own, gpu, row = plan["own"], plan["gpu"], plan["row"]
    console.print(f"{plan['name']} on {plan['gpus']} x {gpu['name']} with {gpu['memory'] / 1e9:.1f} GB", style="bold", markup=False)
    console.print(f"counted with {row['tokens']} tokens a row: {row['why']}", markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for name, size in own["memory"].items():
        table.add_row(name, _amount(size))
    table.add_row("together", _amount(own["total"]), style="bold")
    table.add_row("while loading", _amount(own["loading"]))
    if own["host"]:
        table.add_row("and on the host", _amount(own["host"]))
    shared = f", a row shared by {own['sequence_parallel']} GPUs" if own["sequence_parallel"] > 1 else ""
    console.print(f"memory of a GPU at micro_batch {own['micro_batch']}, gradient checkpointing {own['gradient_checkpointing']}, "
                  f"ZeRO {own['zero_stage']}{shared}")  # fmt: skip
    console.print(table)
    for line in plan["weights"]:
        console.print(line, markup=False)
    if plan["experts"]["why"]:
        console.print(plan["experts"]["why"], markup=False)
    left = gpu["memory"] - max(own["total"], own["loading"])
    if own["fits"]:
        console.print(f"fits: {left / 1e9:.1f} GB to spare", style="green")
    else:
        console.print(f"does not fit: {-left / 1e9:.1f} GB too much", style="red")
    flops, step, speed = own["flops"], own["step_s"], own["tokens_per_s"]
    console.print(
        f"a micro-batch: {flops['forward'] / 1e12:.3g} TFLOP forward ({flops['vision'] / 1e12:.3g} in the vision tower), "
        f"{flops['backward'] / 1e12:.3g} backward; {own['micro_batches_a_step']} of them a step"
    )
    if own["features_kept"]:
        share = flops["vision"] / (flops["forward"] + flops["backward"])
        console.print(f"data.cache_features: for pictures seen before {share:.0%} of it is read; times are of the first time")
    console.print(
        f"a step: {step['fast']:.3g} to {step['slow']:.3g} s, {speed['slow']:,.0f} to {speed['fast']:,.0f} tokens/s "
        f"(the card's limit: {speed['limit']:,.0f})"
    )
    if "choices" in plan:
        _show_choices(console, plan)


def _show_choices(console: Any, plan: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("gradient checkpointing", "largest micro_batch", "GB", "tokens/s", box=None, padding=(0, 2, 0, 2), header_style="")
    for choice in plan["choices"]:
        speed = choice["tokens_per_s"]
        fits = str(choice["micro_batch"]) if choice["fits"] else "none"
        table.add_row(
            choice["gradient_checkpointing"], fits, f"{choice['total'] / 1e9:.1f}", f"{speed['slow']:,.0f} to {speed['fast']:,.0f}"
        )
    console.print("what fits")
    console.print(table)
    longest = plan["longest_row"]
    if longest:
        console.print(f"with the configuration's own settings a row may have about {longest:,} tokens")


def _amount(size: int) -> str:
    return f"{size / 1e9:8.3f} GB" if size >= 1e8 else f"{size / 1e6:8.3f} MB"
