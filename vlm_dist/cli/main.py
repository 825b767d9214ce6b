"""`vlm-dist COMMAND ...`: parse, run, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from vlm_dist.cli import chat, checkpoints, config, data, doctor, evaluate, export, generate, init, inspect, plan, report, train
from vlm_dist.cli import launch as launch_command
from vlm_dist.cli.parsers import parse
from vlm_dist.disk import disk_error, remedy, why
from vlm_dist.errors import UserError
from vlm_dist.mistakes import told_once
from vlm_dist.quiet import quiet_libraries
from vlm_dist.redaction import redacted_screen

COMMANDS = (init, data, config, doctor, inspect, plan, train, launch_command, evaluate, report, checkpoints, generate, chat, export)
DESCRIPTION = """Train vision-language models from tar shards, on one GPU or many, from one YAML.

prepare   init            write a first YAML for a model, a card and your data
          data synth      make a synthetic data set
          data pack       write a data set that you have as tar shards
          data index      find every sample of shards that others made
check     doctor          is this machine fit to train
          config          explain every setting
          data verify     read every sample: what is unusable, duplicates, leaks
          inspect         what the model will be fed, and what looks wrong
          data order      which samples each step holds
          plan            memory and time on a GPU, and what fits
train     train           train, or continue where it stopped
          launch          the same on several GPUs or nodes: deepspeed, torchrun, SLURM, Ray
look      eval, report    scores on held-out samples; one page about a run
          checkpoints     list, verify or prune a run's checkpoints
use       generate        ask a trained model about a picture
          chat            talk with it
          export          write the adapter or a merged model for use elsewhere"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `vlm-dist` with all its commands."""
    parser = argparse.ArgumentParser("vlm-dist", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parse(build_parser(), argv)
    quiet_libraries()
    among_ranks = getattr(arguments, "among_ranks", False)
    return run_reporting(lambda: arguments.run(arguments), debug=arguments.debug, among_ranks=among_ranks)


def launch(
    description: str | None, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None, *, among_ranks: bool = True
) -> int:
    """The command line of the scripts in launch/; returns the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML configuration")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="overrides such as optim.lr=2e-4")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="given by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    train.add_options(parser)
    arguments = parse(parser, argv)
    quiet_libraries()
    return run_reporting(lambda: run(arguments), debug=arguments.debug, among_ranks=among_ranks)


def run_reporting(action, *, debug: bool = False, among_ranks: bool = False) -> int:
    """Run `action`; a user error, or a disk that fails, becomes one line on standard error and an exit code. No secret is printed.

    Args:
        among_ranks: this process may be one of several that a launcher started: then one of them tells what all meet.
    """
    with redacted_screen():
        return _reporting(action, debug=debug, among_ranks=among_ranks)


def _reporting(action, *, debug: bool, among_ranks: bool) -> int:
    try:
        code = action() or 0
        sys.stdout.flush()  # what cannot be printed is told here, and not when Python ends
        return code
    except UserError as error:
        if debug:
            raise
        if not error.told:
            told_once(error, _tell) if among_ranks else _tell(error)
        return error.exit_code
    except BrokenPipeError:
        _forget_output()
        return 141
    except Exception as error:
        failed = disk_error(error)
        if debug or failed is None:
            raise
        what = str(getattr(failed, "filename", None) or "writing")
        print(f"vlm-dist: {what[:160]}: {why(failed)}; {remedy(failed)}, then run the same command again", file=sys.stderr)
        _forget_output()
        return 5
    except KeyboardInterrupt:
        print("vlm-dist: interrupted", file=sys.stderr)
        return 130


def _tell(error: UserError) -> None:
    print(f"vlm-dist: {error}", file=sys.stderr, flush=True)


def _forget_output() -> None:
    """Python writes what waits for standard output once more when it ends; there is nobody to read it, or no room."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # it is no file, as in a notebook
        return


if __name__ == "__main__":
    sys.exit(main())
