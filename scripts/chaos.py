"""A run that is killed, stopped, starved and moved to other numbers of ranks, beside one that is left alone: both must be the same.

    python scripts/chaos.py --steps 60 --faults 6                  some minutes
    python scripts/chaos.py --minutes 60 --out docs/benchmarks/chaos.json      as many steps and faults as an hour has room for

A tiny LLaVA in NF4 trains on shards of an HTTP server that answers some requests with 503, cuts others and is slow with others; some
samples are broken. At random steps (by --seed) the run gets SIGKILL or SIGTERM, or is stopped and let go on, or loses one of its ranks;
each start has one or two ranks. In the end losses of every step, totals, quarantine and adapter are compared.
With --minutes a short run tells first how long a start and a step take; faults then come, on average, after as many steps as take the
time of a start, so that half of the disturbed run's time at best goes into steps. When the minutes are over it goes on undisturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vlm_dist.data.shards import read_in_order, write_shards
from vlm_dist.data.synthetic import synthesise
from vlm_dist.distributed import alone
from vlm_dist.environment import describe_environment
from vlm_dist.run_dir import read_jsonl, write_json
from vlm_dist.testing import tiny_checkpoint
from vlm_dist.testing.server import FileHandler

ROOT = Path(__file__).resolve().parents[1]
ACTIONS = ("kill", "kill", "terminate", "pause", "lose a rank")
CONTINUING = re.compile(r"continuing from .* \(step (\d+)\)")
TOLERANCE = 1e-4  # of losses and adapter: sums over other numbers of ranks round otherwise


class Handler(FileHandler):
    """Files with ranges; every so often a 503, a cut or a slow answer."""

    server: Server

    def do_GET(self) -> None:
        path, fault = Path(self.translate_path(self.path)), self.server.next_fault()
        if not path.is_file() or fault == "503":
            self.send_error(503 if path.is_file() else 404)
        else:
            self.send_file(path, fault)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path, seed: int):
        super().__init__(("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=str(folder)))
        self.rng, self.lock, self.share = random.Random(seed), threading.Lock(), 0.0
        self.counts: dict[str, int] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def next_fault(self) -> str:
        with self.lock:
            fault = self.rng.choice(("503", "cut", "slow")) if self.rng.random() < self.share else "none"
            self.counts[fault] = self.counts.get(fault, 0) + 1
            return fault


@dataclass
class Run:
    """One run, however often it is started."""

    config: Path
    folder: Path
    starts: int = 0
    steps_lost: int = 0
    recovered_s: list[float] = field(default_factory=list)
    happened: dict[str, int] = field(default_factory=dict)

    def step(self) -> int:
        """The last one in metrics.jsonl."""
        return rows[-1]["step"] if (rows := self.rows()) else 0

    def rows(self) -> list[dict[str, Any]]:
        """Of steps."""
        return [row for row in read_jsonl(self.folder / "metrics.jsonl") if "loss" in row]

    @property
    def log(self) -> Path:
        """What the last start printed."""
        return self.folder.parent / f"{self.folder.name}-{self.starts}.log"

    def start(self, ranks: int) -> subprocess.Popen:
        self.starts += 1
        train = [str(ROOT / "launch" / "train.py"), "--config", str(self.config)]
        several = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
        log = self.log.open("w")
        return subprocess.Popen(
            [sys.executable, *(several if ranks > 1 else []), *train],
            env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def disturb(self, process: subprocess.Popen, action: str) -> None:
        self.happened[action] = self.happened.get(action, 0) + 1
        family = family_of(process.pid)
        if action == "pause":
            for number in (signal.SIGSTOP, signal.SIGCONT):
                for one in family:
                    one.send_signal(number)
                time.sleep(2)
            return
        workers = [one for one in family[1:] if "train.py" in " ".join(one.cmdline())]
        if action == "lose a rank" and workers:
            workers[-1].kill()
        elif action == "terminate":
            process.terminate()
        else:  # as a machine that loses its power: a launcher's ranks are in sessions of their own, and would go on
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        process.wait(120)

    def through(self, ranks: int, faults: list[tuple[int, str]], longest_s: float = 3600, calm_from: float = math.inf) -> int:
        """Start it, disturb it at steps, and let it end; returns the exit code. The faults that were made are taken from the list; from
        the moment `calm_from` on there are no more."""
        before, began, seen = self.step(), time.monotonic(), False
        process = self.start(ranks)
        while process.poll() is None:
            if time.monotonic() - began > longest_s:
                self.disturb(process, "kill")
                raise SystemExit(f"chaos: no end after {longest_s:.0f} s; see {self.folder.parent}")
            time.sleep(0.2)
            now = self.step()
            if not seen and now and (now != before or before == 0):
                seen = True
                self.recovered_s.append(time.monotonic() - began)
            if faults and time.monotonic() > calm_from:
                print(f"the time is over: it goes on undisturbed from step {now}, without {len(faults)} faults", flush=True)
                faults.clear()
            if seen and faults and now >= faults[0][0]:
                until, action = faults.pop(0)
                self.disturb(process, action)
                print(f"step {until}: {action} ({ranks} ranks) at step {now}, {time.monotonic() - began:.0f} s after the start", flush=True)
        told = CONTINUING.search(self.log.read_text(errors="replace"))
        self.steps_lost += before - (int(told[1]) if told else 0) if seen else 0
        return process.returncode


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def prepare(folder: Path, seed: int) -> dict[str, Any]:
    """Shards with some broken samples, a checkpoint, and the configuration of both runs."""
    made = synthesise(folder / "made", train=120, heldout=4, tasks=("qa",), seed=seed, size=32, shard_size=20)
    raws = [{name: raw[name] for name in ("__key__", "jpg", "json")} for raw in read_in_order([str(path) for path in made["qa-train"]])]
    for number in range(5, len(raws), 17):
        raws[number]["jpg"] = b"no picture"
    write_shards(folder / "served", "x", raws, samples_per_shard=20)
    tiny_checkpoint("llava", folder / "base")
    return {
        "output_dir": str(folder / "runs"),
        "model": {"name": str(folder / "base"), "load_in_4bit": True, "dtype": "float32"},
        "lora": {"r": 4},
        "data": {"max_seq_length": 256, "shuffle_window": 20, "max_bad_fraction": 0.2, "cache_dir": str(folder / "cache")},
        "optim": {"lr": 1e-3},
        "training": {"global_batch": 4, "micro_batch": 2},
        "log": {"wandb": "disabled"},
    }  # fmt: skip


def sizes(settings: dict[str, Any], folder: Path, address: str, minutes: float) -> tuple[int, int]:
    """Steps and faults for which calm and disturbed run together take so long, from a short run."""
    config = {**settings, "name": "probe", "data": {**settings["data"], "train": [address]}}
    config["training"] = {**settings["training"], "steps": 30}
    (folder / "probe.yaml").write_text(json.dumps(config))
    probe = Run(folder / "probe.yaml", folder / "runs" / "probe")
    if probe.through(1, []) != 0:
        raise SystemExit(f"chaos: the short run failed: {probe.log.read_text()[-2000:]}")
    start_s, step_s = probe.recovered_s[0], statistics.median(row["step_s"] for row in probe.rows())
    faults = max(1, round((60 * minutes / start_s - 2) / 3))
    print(f"a start takes {start_s:.0f} s, a step {step_s:.2f} s: {faults} faults", flush=True)
    return round(faults * start_s / step_s), faults


def compare(calm: Run, wild: Run) -> dict[str, float | bool]:
    """Largest relative differences, and whether what is counted is the same."""
    from safetensors.numpy import load_file

    rows = [[row for row in read_jsonl(run.folder / "metrics.jsonl") if "loss" in row] for run in (calm, wild)]
    pairs = list(zip(*rows, strict=True))
    adapters = [load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (calm, wild)]
    spread = max(float(abs(tensor).max()) for tensor in adapters[0].values())
    quarantines = [sorted((row["shard"], row["key"]) for row in read_jsonl(run.folder / "quarantine.jsonl")) for run in (calm, wild)]
    return {
        "loss": max(abs(a["loss"] - b["loss"]) / max(1.0, abs(a["loss"])) for a, b in pairs),
        "adapter": max(float(abs(adapters[0][name] - adapters[1][name]).max()) for name in adapters[0]) / spread,
        "same_steps": all(a["step"] == b["step"] for a, b in pairs),
        "same_samples_and_tokens": all(a[name] == b[name] for a, b in pairs for name in ("samples", "tokens") if name in a),
        "same_quarantine": quarantines[0] == quarantines[1],
    }


def made_runs(folder: Path, settings: dict[str, Any], address: str, steps: int, faults: int) -> tuple[Run, Run]:
    """The calm and the wild one; each saves some ten times between two faults."""
    runs = []
    for name in ("calm", "wild"):
        config = {**settings, "name": name, "data": {**settings["data"], "train": [address]}}
        config |= {"training": {**settings["training"], "steps": steps}, "checkpoint": {"save_every": max(5, steps // faults // 10)}}
        (folder / f"{name}.yaml").write_text(json.dumps(config))
        runs.append(Run(folder / f"{name}.yaml", folder / "runs" / name))
    return runs[0], runs[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--faults", type=int, default=6, help="how often the run is disturbed")
    parser.add_argument("--minutes", type=float, help="in place of --steps and --faults: how long both runs together take, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks of a start, drawn")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rng, began = random.Random(arguments.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = prepare(folder, arguments.seed)
        (folder / "runs").mkdir()
        server = Server(folder / "served", arguments.seed)
        address = f"http://127.0.0.1:{server.server_port}/x-{{000000..{(119 // 20):06d}}}.tar"
        steps, faults = arguments.steps, arguments.faults
        if arguments.minutes:
            steps, faults = sizes(settings, folder, address, arguments.minutes)
        calm, wild = made_runs(folder, settings, address, steps, faults)
        if calm.through(1, []) != 0:
            raise SystemExit(f"chaos: the calm run failed: {calm.log.read_text()[-2000:]}")
        server.share = 0.2
        plan = [(step, rng.choice(ACTIONS)) for step in sorted(rng.sample(range(1, steps - 1), faults))]
        calm_from = began + 60 * arguments.minutes if arguments.minutes else math.inf
        while (code := wild.through(rng.choice(arguments.ranks), plan, calm_from=calm_from)) != 0 or wild.step() < steps:
            if wild.starts > faults + 1:
                raise SystemExit(f"chaos: exit code {code} without a fault: {wild.log.read_text()[-2000:]}")
        same = compare(calm, wild)
        summaries = [json.loads((run.folder / "summary.json").read_text()) for run in (calm, wild)]
    found = {
        "command": " ".join(["python scripts/chaos.py", *sys.argv[1:]]),
        "steps": steps, "seed": arguments.seed, "starts": wild.starts, "disturbed": wild.happened, "server": server.counts,
        "steps_lost": wild.steps_lost, "recovery_s": [round(one, 1) for one in wild.recovered_s], "goodput": summaries[1]["goodput"],
        "calm": {"recovery_s": round(calm.recovered_s[0], 1), "goodput": summaries[0]["goodput"], "wall_s": summaries[0]["wall_s"]},
        "difference": same, "wall_s": round(time.monotonic() - began), "environment": describe_environment(alone()),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in found.items() if name != "environment"}, indent=1))
    if arguments.out:
        write_json(arguments.out, found)
    numbers_fit = all(math.isfinite(same[name]) and same[name] <= TOLERANCE for name in ("loss", "adapter"))
    return 0 if numbers_fit and all(value for name, value in same.items() if name.startswith("same")) else 1


if __name__ == "__main__":
    sys.exit(main())
