"""`vlm-dist train`."""

from __future__ import annotations

import argparse
import functools
import json
import signal
from typing import TYPE_CHECKING, Any

from vlm_dist.checking.doctor import Check
from vlm_dist.cli.doctor import show
from vlm_dist.cli.parsers import add_config, new_parser
from vlm_dist.config_load import load_config
from vlm_dist.errors import ConfigError, MachineError
from vlm_dist.launched import announced

if TYPE_CHECKING:
    from vlm_dist.config import Config


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "train",
        "Train, or continue where the same run stopped.",
        "vlm-dist train configs/quickstart.yaml optim.lr=1e-3 name=my-run",
    )
    add_config(parser)
    add_options(parser)
    parser.set_defaults(run=run, among_ranks=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="check the configuration, the shards and the plan; load no weights")
    parser.add_argument(
        "--preflight", action="store_true", help="check every node of this start, and what lies between them; train nothing"
    )
    parser.add_argument("--resume-anyway", action="store_true", help="continue a run although its configuration has changed")
    parser.add_argument("--json", action="store_true", help="print the outcome (or the plan of --dry-run) as JSON")


def run(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.dry_run:
        return _dry_run(config, announced().world_size, arguments)
    if arguments.preflight:
        from vlm_dist.checking.preflight import preflight

        return _told(preflight(config, resume_anyway=arguments.resume_anyway), arguments, speaks=announced().rank == 0)
    from vlm_dist.training.train import train

    return _end(train(config, resume_anyway=arguments.resume_anyway), arguments, speaks=announced().rank == 0)


def run_on_ray(arguments: argparse.Namespace) -> int:
    """The same, by workers of a Ray cluster; this process is none of them, whatever a launcher's variables say."""
    config = _config(arguments)
    if arguments.dry_run:
        return _dry_run(config, config.ray.workers or 1, arguments)
    from vlm_dist.training.on_ray import train_on_ray

    if arguments.preflight:
        from vlm_dist.checking.preflight import preflight

        found = train_on_ray(config, instead=functools.partial(preflight, resume_anyway=arguments.resume_anyway))
        return _told(found, arguments) if "fit" in found else _end(found, arguments)
    return _end(train_on_ray(config, resume_anyway=arguments.resume_anyway), arguments)


def _config(arguments: argparse.Namespace) -> Config:
    if arguments.dry_run and arguments.preflight:
        raise ConfigError("--dry-run checks the configuration here, --preflight every node of a start; give one of the two")
    return load_config(arguments.config, arguments.overrides)


def _end(summary: dict[str, Any], arguments: argparse.Namespace, *, speaks: bool = True) -> int:
    if speaks:
        _tell(summary, arguments)
    if summary["ended"] == "interrupted":
        return 128 + signal.Signals[summary["signal"]]
    return 0


def _told(found: dict[str, Any], arguments: argparse.Namespace, *, speaks: bool = True) -> int:
    """The findings, by the first rank; the exit code is the same on all."""
    if speaks:
        bad = sum(check["state"] == "bad" for check in found["checks"])
        if arguments.json:
            print(json.dumps({"fit": found["fit"], "checks": found["checks"]}, indent=1))
        else:
            for check in found["checks"]:
                show(Check(**check))
            print(
                f"{'fit' if found['fit'] else 'not fit'} to train on these nodes: {bad} bad of {len(found['checks'])} findings", flush=True
            )
    return 0 if found["fit"] else MachineError.exit_code


def _dry_run(config: Config, ranks: int, arguments: argparse.Namespace) -> int:
    from vlm_dist.checking.dry_run import dry_run

    plan = dry_run(config, ranks)
    if arguments.json:
        print(json.dumps(plan, indent=1))
    else:
        for key, value in plan.items():
            print(f"{key:20} {value}")
        print("all checks passed; nothing was trained")
    return 0


def _tell(summary: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(summary, indent=1))
    elif summary.get("already_finished"):
        print(f"this run is finished (step {summary['step']}); result: {summary['result']}. Give it another name= to train again")
