"""`vlm-dist init`: a first YAML for a model, a card and data; or the quickstart's two."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_dist.cli.parsers import new_parser
from vlm_dist.cli.starter import starter_file
from vlm_dist.errors import ConfigError

QUICKSTART = ("configs/quickstart_base.yaml", "configs/quickstart.yaml")
DEFAULT_MODEL, DEFAULT_GPU, DEFAULT_DATA = "qwen2_5_vl", "rtx4090", "my-shards/*.tar"
SHARDS = re.compile(r"\.tar\b|^pipe:")


def add_parser(commands: Any) -> None:
    parser = new_parser(
        commands,
        "init",
        "Write a first YAML for a model, a card and your data, with comments; it asks on a terminal, unless options say it.",
        "vlm-dist init --model qwen2_5_vl --gpu rtx4090 --data 'my-shards/*.tar'\n  vlm-dist init --quickstart my-folder",
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("."), help="where to (default: here)")
    parser.add_argument("--model", help="a hub id, a folder with a checkpoint, or a family: its usual model (default: qwen2_5_vl)")
    parser.add_argument("--gpu", metavar="NAME", help=f"a card, such as rtx4090, a100, h100 (default: this machine's, else {DEFAULT_GPU})")
    parser.add_argument("--data", help=f"tar shards, or what is to be packed into them: a JSON, a folder (default: {DEFAULT_DATA})")
    parser.add_argument("--name", help="name of the run and of its YAML (default: the model's)")
    parser.add_argument("--quickstart", action="store_true", help="write the quickstart's two YAMLs instead")
    parser.add_argument("--json", action="store_true", help="print what was written, chosen and comes next as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.quickstart:
        if given := [name for name in ("model", "gpu", "data", "name") if getattr(arguments, name)]:
            raise ConfigError(f"init: --quickstart writes two finished YAMLs; leave --{given[0]} away")
        files, told = {name: starter_file(name).read_text(encoding="utf-8") for name in QUICKSTART}, _quickstart()
    else:
        files, told = _starter(arguments)
    for name in files:
        if (arguments.folder / name).exists():
            raise ConfigError(f"init: '{arguments.folder / name}' exists already and stays as it is; give another FOLDER or --name")
    for name, text in files.items():
        path = arguments.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    if arguments.folder.resolve() != Path.cwd():
        told["next"].insert(0, shlex.join(["cd", str(arguments.folder)]))
    _tell({"written": [str(arguments.folder / name) for name in files], **told}, arguments.json)
    return 0


def _quickstart() -> dict[str, Any]:
    base, main = QUICKSTART
    commands = ["data synth data/quickstart --train 8000 --heldout 200", f"train {base}", f"train {main}", "report runs/quickstart"]
    return {"notes": [], "next": [f"vlm-dist {command}" for command in commands]}


def _starter(arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, Any]]:
    """The YAML by its name, and what there is to say about it."""
    from jinja2 import Environment, PackageLoader

    from vlm_dist.models.source import check_source, looks_like_path
    from vlm_dist.planning.first import GLOBAL_BATCH, first_settings, known
    from vlm_dist.planning.gpus import find_gpu, this_gpu

    notes: list[str] = []
    here = None if arguments.gpu else this_gpu()
    _ask(arguments, here.name if here else DEFAULT_GPU)
    gpu = find_gpu(arguments.gpu) if arguments.gpu else here or find_gpu(DEFAULT_GPU)
    model = known(arguments.model or DEFAULT_MODEL)
    check_source(model.name)
    for option, value in (("model", model.name), ("gpu", gpu.name), ("data", DEFAULT_DATA)):
        if not getattr(arguments, option):
            notes.append(f"--{option} was not given: {value}")
    first = first_settings(model, gpu)
    if not first.fits:
        notes.append(
            f"about {first.gigabytes} GB is more than {gpu.name} has ({first.card} GB): a larger card, or engine.zero_stage: 3 on several"
        )
    name = arguments.name or re.sub(r"[^a-z0-9]+", "_", Path(model.name).name.lower()).strip("_") + (
        "_qlora" if first.load_in_4bit else "_lora"
    )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name: found '{name}'; expected letters, digits, '.', '_' and '-', such as my-run")
    train, heldout, packing = _data(arguments.data, arguments.folder) if arguments.data else (DEFAULT_DATA, "", [])
    path = f"configs/{name}.yaml"
    hub = not looks_like_path(model.name)
    environment = Environment(loader=PackageLoader("vlm_dist.cli", "."), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)  # JSON is YAML
    shown = {**asdict(model), "name": model.name if hub else _from(arguments.folder, model.name)}
    text = environment.get_template("starter.yaml.j2").render(
        first=first, model=shown, gpu=gpu.name, name=name, path=path, hub=hub, train=train, heldout=heldout, global_batch=GLOBAL_BATCH
    )
    commands = [f"inspect {path}", f"plan {path} --gpu {gpu.name} --auto", f"train {path}"]
    chosen = {"model": model.name, "family": model.family, "billions": model.billions, "gpu": gpu.name, **asdict(first), "fits": first.fits}
    following = [*packing, f"vlm-dist doctor {path}", *(f"vlm-dist {command}" for command in commands)]
    return {path: text}, {
        "chosen": chosen,
        "notes": [*notes, "a guess from a table: `vlm-dist plan --auto` finds better"],
        "next": following,
    }


def _ask(arguments: argparse.Namespace, gpu: str) -> None:
    """On a terminal, when no option says anything."""
    given = arguments.model or arguments.gpu or arguments.data or arguments.json
    if given or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    from rich.console import Console
    from rich.prompt import Prompt

    from vlm_dist.planning.first import SUGGESTED
    from vlm_dist.planning.gpus import GPUS

    console = Console(highlight=False)
    for family, model in SUGGESTED.items():
        console.print(f"  {family:16} {model}", markup=False)
    arguments.model = Prompt.ask("Model: a family of these, a hub id, or a folder", console=console, default=DEFAULT_MODEL)
    console.print(f"  {', '.join(GPUS)}", markup=False)
    arguments.gpu = Prompt.ask("Card", console=console, default=gpu)
    arguments.data = Prompt.ask("Data: tar shards, or a JSON or folder to be packed", console=console, default=DEFAULT_DATA)


def _data(source: str, folder: Path) -> tuple[str, str, list[str]]:
    """Shards to train on, held-out ones, and the command that packs them where there are none yet; as seen from `folder`."""
    path = Path(source).expanduser()
    if SHARDS.search(source):
        return _from(folder, source), "", []
    if path.is_dir() and any(path.glob("*.tar")):
        inside = _from(folder, source)
        return (f"{inside}/train-*.tar", f"{inside}/heldout-*.tar", []) if any(path.glob("heldout-*.tar")) else (f"{inside}/*.tar", "", [])
    packed = f"data/{re.sub(r'[^A-Za-z0-9._-]+', '_', path.stem) or 'mine'}"
    command = shlex.join(["vlm-dist", "data", "pack", _from(folder, source) if path.exists() else source, packed, "--heldout", "200"])
    return f"{packed}/train-*.tar", f"{packed}/heldout-*.tar", [command]


def _from(folder: Path, path: str) -> str:
    """A path of here, as it is written in a file of `folder`, whose commands run there."""
    if "://" in path or path.startswith(("/", "~", "pipe:")) or folder.resolve() == Path.cwd():
        return path
    return os.path.relpath(path, folder)


def _tell(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(told, indent=1))
        return
    for path in told["written"]:
        print(f"written: {path}")
    for note in told["notes"]:
        print(f"  {note}")
    print("next:")
    for line in told["next"]:
        print(f"  {line}")
