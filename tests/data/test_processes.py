"""Samples prepared in processes: the same steps, states and words as with threads; what is killed is told, and nobody is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, child_environment, command, losses_of, write_config
from tests.data.test_stream import processor, rows, stream_of  # noqa: F401
from vlm_dist import load_config, train
from vlm_dist.data import processes
from vlm_dist.data.processes import SHARED
from vlm_dist.errors import DataError, MachineError

pytestmark = pytest.mark.slow


def in_processes(stream, number=2, processes: bool | str = True):
    stream.in_processes = True
    stream.config = stream.preparer.config = stream.config.model_copy(update={"workers": number, "processes": processes})
    return stream


def ours():
    """Files of this process's samples in shared memory."""
    return SHARED.glob(f"vlm_dist-{os.getpid()}-*")


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_those_of_threads(tmp_path, shards, processor, packing):  # noqa: F811
    broken = tmp_path / "broken-000000.tar"
    broken.write_bytes(Path(shards["qa-train"][0]).read_bytes().replace(b'"assistant"', b'"nobody-no"'))
    found = []
    for apart in (False, True):
        folder = tmp_path / str(apart)
        folder.mkdir()
        settings = {"packing": packing, "max_bad_fraction": 1.0, "pack_lookahead": 4}
        stream = stream_of([str(broken), *shards["qa-train"][1:]], processor, folder, **settings)
        stream.pack = packing
        steps = [(in_processes(stream) if apart else stream).next_step() for _ in range(6)]
        state, notes = stream.state(), stream.encoder.tally.to_dict()
        stream.close()
        quarantined = sorted((folder / "quarantine.jsonl").read_text().splitlines())
        found.append((steps, state, quarantined, notes))
    (threads, *told), (processes, *same) = found
    assert told == same and len(told[1]) > 5
    for one, other in zip(threads, processes, strict=True):
        assert (one.counts, one.keys, one.labels) == (other.counts, other.keys, other.labels)
        for batch, again in zip(one.micro_batches, other.micro_batches, strict=True):
            assert batch.keys() == again.keys() and all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_run_in_processes(settings, tmp_path):
    """Losses, and the system prompts that an adapter remembers."""
    settings["data"]["heldout"] = []
    folders = []
    for apart in ("false", "true"):
        train(load_config(write_config(settings, tmp_path), [f"data.processes={apart}", f"name=run-{apart}"]))
        folders.append(Path(settings["output_dir"]) / f"run-{apart}")
    assert losses_of(folders[0]) == losses_of(folders[1])
    records = [json.loads((folder / "adapter" / "vlm_dist.json").read_text()) for folder in folders]
    assert records[0].get("system_prompt") == records[1].get("system_prompt")


@pytest.mark.parametrize("room", ["enough", "none"])
def test_shared_memory_is_left_as_it_was(tmp_path, shards, processor, room, monkeypatch):  # noqa: F811
    """Also of samples that nobody has asked for yet; without room the samples come another way."""
    shared = tmp_path / "shared"
    monkeypatch.setattr(processes, "SHARED", shared)
    if room == "enough":
        shared.mkdir()
    expected = [step.keys for _, step in zip(range(5), stream_of(shards["qa-train"], processor, tmp_path).steps(), strict=False)]
    steps = in_processes(stream_of(shards["qa-train"], processor, tmp_path), 1).steps()
    assert [next(steps).keys for _ in range(5)] == expected
    while room == "enough" and not any(shared.iterdir()):  # of the steps ahead
        time.sleep(0.05)
    steps.close()
    assert not list(shared.glob("*"))


def children(pid: int) -> list[int]:
    """Processes that prepare samples for a process, by their words."""
    import psutil

    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            found += [one.pid] if "forkserver" in " ".join(one.cmdline()) else []
    return found


def prepared(stream) -> set[int]:
    """The processes that prepare the samples of a stream that has given a step, not the server that they come from."""
    import psutil

    before = set(children(os.getpid()))
    stream.next_step()
    return {pid for pid in set(children(os.getpid())) - before if psutil.Process(pid).ppid() != os.getpid()}


@pytest.mark.parametrize("idle_s", [0, 1.5])
def test_one_that_is_killed_is_told(tmp_path, shards, processor, idle_s):  # noqa: F811
    """While it works, and when it has nothing to do."""
    stream = in_processes(stream_of(shards["qa-train"], processor, tmp_path), 1)
    workers = prepared(stream)
    time.sleep(idle_s)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    time.sleep(idle_s / 3)
    with pytest.raises(MachineError, match=r"data.processes: a process that prepares samples was killed .* data.workers lower"):
        for _ in range(20):
            stream.next_step()
    stream.close()


SIGNALLED = """
import multiprocessing, os, signal, sys, threading
from contextlib import suppress
import psutil
from tests.data.test_processes import children
from vlm_dist import load_config, train

def blocked():
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())

def of_the_shared_server():
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(blocked) == set(), "others' processes must not block signals"

def send():
    while not ended.is_set():
        for pid in set(children(os.getpid())) - known:
            for number in (signal.SIGTERM, signal.SIGINT):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

if __name__ == "__main__":
    if sys.argv[2] == "shared first":
        of_the_shared_server()
    ended, known = threading.Event(), set(children(os.getpid()))
    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    train(load_config(sys.argv[1], ["data.processes=true"]))
    ended.set()
    sender.join()
    of_the_shared_server()
    print("ended")
"""


@pytest.mark.parametrize("order", ["ours first", "shared first"])
def test_signals_to_all_are_for_the_trainer(settings, tmp_path, order):
    """However early they come (a scheduler sends SIGTERM to all processes of a job), whoever started a server of forks before; and others'
    processes hear theirs."""
    settings["data"]["heldout"] = []
    script = tmp_path / "script.py"
    script.write_text(SIGNALLED)
    words = [sys.executable, str(script), str(write_config(settings, tmp_path)), order]
    done = subprocess.run(words, env=child_environment(), capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.endswith("ended\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_others_delete_are_made_again(tmp_path, shards, processor):  # noqa: F811
    """As systemd does when a user logs out."""
    expected = [step.keys for _, step in zip(range(5), stream_of(shards["qa-train"], processor, tmp_path).steps(), strict=False)]
    steps = in_processes(stream_of(shards["qa-train"], processor, tmp_path)).steps()
    found = [next(steps).keys]
    while not (files := list(ours())):
        time.sleep(0.05)
    for file in files:
        file.unlink()
    assert [*found, *(next(steps).keys for _ in range(4))] == expected
    steps.close()


def test_shards_that_change_before_they_begin(tmp_path, shards, processor):  # noqa: F811
    copies = [shutil.copy(path, tmp_path) for path in shards["qa-train"]]
    stream = in_processes(stream_of(copies, processor, tmp_path), 1)
    for path, other in zip(copies, shards["reading-train"], strict=True):
        shutil.copy(other, path)
    with pytest.raises(DataError, match=r"does not hold at byte .* what its index says .* it was changed"):
        stream.next_step()
    stream.close()


class Stubborn:
    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise ValueError("not me")


@pytest.mark.parametrize("how", ["sent", "received"])
def test_a_processor_that_cannot_be_handed_over(tmp_path, shards, processor, how, monkeypatch, caplog):  # noqa: F811
    if how == "sent":
        processor.own, words = Stubborn(), "not me"
    else:  # its class is of a module that only the trainer has
        module, words = types.ModuleType("only_here"), "No module named 'only_here'"
        module.Own = type("Own", (type(processor),), {"__module__": "only_here"})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "only_here", module)
        processor.__class__ = module.Own  # type: ignore[attr-defined]
    stream = in_processes(stream_of(shards["qa-train"], processor, tmp_path), 1)
    with pytest.raises(MachineError, match=rf"data.processes: this processor cannot be handed .* \({words}\); set it to false"):
        stream.next_step()
    stream.close()
    left_open = in_processes(stream_of(shards["qa-train"], processor, tmp_path), 1, "auto")
    assert left_open.next_step().counts.samples == 4 and caplog.text.count("; threads prepare the samples") == 1
    left_open.close()


def test_a_scheduler_signals_all_of_a_job(settings, tmp_path):
    """SLURM sends its signal to every process: samples still come until the trainer has ended its step and saved."""
    settings["data"]["heldout"] = []
    settings |= {"training": {"steps": 100_000, "global_batch": 4, "micro_batch": 2}}
    words = command("train", str(write_config(settings, tmp_path)), "data.processes=true")
    process = subprocess.Popen(words, env=child_environment(), cwd=ROOT, start_new_session=True)
    run = Path(settings["output_dir"]) / "tiny"
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(120) == 143
    assert json.loads((run / "summary.json").read_text())["ended"] == "interrupted" and any((run / "checkpoints").iterdir())


SCRIPT = """
import sys
from vlm_dist import load_config, train
train(load_config(sys.argv[1], ["data.processes=true"]))
print("ended")
"""


def test_a_script_without_a_guard_and_a_trainer_that_is_killed(settings, tmp_path):
    """A new process would read the script again; and one whose trainer is gone ends by itself."""
    settings["data"]["heldout"] = []
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(write_config(settings, tmp_path))]
    done = subprocess.run(words, env=child_environment(), capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.count("ended") == 1, done.stderr
    assert "Traceback" not in done.stderr
    settings |= {"name": "long", "training": {"steps": 100_000, "global_batch": 4, "micro_batch": 2}}
    process = subprocess.Popen([*words[:2], str(write_config(settings, tmp_path))], env=child_environment(), cwd=ROOT)
    metrics = Path(settings["output_dir"]) / "long" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) >= 3  # the server, and two
    process.kill()
    process.wait()
    for pid in workers:
        while Path(f"/proc/{pid}/cmdline").exists() and b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
            time.sleep(0.1)
