"""The losses of a run do not depend on the launcher, the number of ranks, the ZeRO stage or how the batch is cut."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, child_environment, command, losses_of, write_config
from tests.warm import Warm, warm_ranks
from vlm_dist import load_config, train
from vlm_dist.checkpoints.form import verify_checkpoint
from vlm_dist.cli.main import launch, main
from vlm_dist.cli.train import run_on_ray
from vlm_dist.data.shards import read_in_order
from vlm_dist.run_dir import read_jsonl
from vlm_dist.training import outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent


def port(offset: int) -> str:
    return str(21_000 + (os.getpid() * 7 + offset) % 18_000)


FULL = ["lora=null", "model.load_in_4bit=false", "model.freeze=[vision]"]
STARTED: list[subprocess.Popen | Warm] = []


@pytest.fixture(autouse=True)
def _leave_nothing_running():
    yield
    while STARTED:
        process = STARTED.pop()
        try:
            os.killpg(process.pid, signal.SIGKILL)  # ranks that outlived their launcher too
        except ProcessLookupError:
            continue


def start(*words: str) -> subprocess.Popen:
    """A launcher in a process group of its own."""
    environment = child_environment(PATH=f"{BIN}:{os.environ['PATH']}")
    command = [str(word) for word in words]
    STARTED.append(
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    )
    return STARTED[-1]


def torchrun(*words: str, offset: int = 0) -> subprocess.Popen:
    return start(BIN / "torchrun", "--nproc-per-node", "2", "--master-port", port(offset), *words)


def finish(process: subprocess.Popen | Warm, code: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output[-6000:]
    return output


def several_ranks(number: int, script: str, *words: str | Path) -> str:
    """Without a launcher, which tests below have: its start and the imports of each rank take longer than what is tested."""
    STARTED.extend(processes := warm_ranks(number, script, *words, environment=child_environment()))
    return "".join(finish(process) for process in processes)


two_ranks = functools.partial(several_ranks, 2)


@pytest.fixture
def config(settings, shards, tmp_path) -> str:
    """Captions and short answers mixed, so that a mean of means would fail."""
    settings["data"].update(heldout=[], train=[*shards["qa-train"], *shards["caption-train"]])
    settings["training"] = {"steps": 4, "global_batch": 4, "micro_batch": 4}
    settings["checkpoint"] = {"save_every": 0}
    return str(write_config(settings, tmp_path))


@pytest.fixture
def reference(config, tmp_path):
    """Losses of one process with one micro-batch a step."""

    def losses(name: str, *overrides: str) -> list[float]:
        train(load_config(config, [*overrides, f"name={name}"]))
        return losses_of(tmp_path / "runs" / name)

    return losses


def many(config: str, runs: list[list[str]], folder: Path, faults: dict[int, str | int] | None = None) -> Path:
    path = folder / "runs.json"
    path.write_text(
        json.dumps([{"config": config, "overrides": run, "fault": (faults or {}).get(number)} for number, run in enumerate(runs)])
    )
    return path


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_stage_on_two_ranks(config, reference, checkpoint, tmp_path, family):
    """LoRA and QLoRA; 1 micro-batch of 4 on one rank, 1 x 2 rounds on two."""
    model = f"model.name={checkpoint(family)}"
    forms = {"qlora": [model], "lora": [model, "model.load_in_4bit=false"]}
    runs = {
        f"{form}-{stage}": [*options, f"name={form}-{stage}", f"engine.zero_stage={stage}", "training.micro_batch=1"]
        for form, options in forms.items()
        for stage in (0, 1, 2, 3)
    }
    runs["qlora-2-whole"] = [model, "name=qlora-2-whole", "training.micro_batch=2"]
    output = two_ranks("tests/launch/many.py", many(config, list(runs.values()), tmp_path))
    expected = {form: reference(f"{form}-here", *options) for form, options in forms.items()}
    for name in runs:
        assert losses_of(tmp_path / "runs" / name) == pytest.approx(expected[name.split("-")[0]], rel=1e-4), (name, output[-2000:])
        assert "trainable tensors have a gradient" in (tmp_path / "runs" / name / "logs" / "rank-0.log").read_text(), name


def test_kernels_and_number_types_at_every_stage(config, shards, qwen, tmp_path):
    """What a GPU does, as far as a CPU can: all kernels on NF4 in bfloat16, float16 with a scaled loss, held-out samples of which one
    rank has fewer. Gradients are added up in float32 at every stage, so the losses are those of stage 0; so are the answers, with and
    without kernels. At stage 3 the hooks of each module bring what flows back to its input together before that of its neighbours (base and
    adapter of Q, then of K, then of V; kernels take the three one by one, too, and gate and up, so that the adapters' part of these
    is rounded to 16 bit before it is added): another order of sums in 16 bit, none to be seen in float32, where the same kernels are held
    to 1e-6, nor while the adapters' B is zero."""
    few = [f"model.name={qwen}", f"data.heldout={json.dumps(shards['qa-heldout'])}", "evaluation.samples=5", "evaluation.batch_size=2"]
    more = [*few, "evaluation.max_new_tokens=3", "training.micro_batch=2"]
    forms = {
        "bfloat16": ["model.dtype=bfloat16", "kernels=all"], "float16": ["model.dtype=float16", "kernels=off"], "kernels": ["kernels=all"],
        "plain": ["kernels=off"], "whole": FULL,
    }  # fmt: skip
    stages = {"bfloat16": (0, 1, 2, 3), "float16": (0, 1, 2, 3), "kernels": (0, 3), "plain": (0, 3), "whole": (0, 3)}
    runs = [
        [*more, *options, f"name={form}-{stage}", f"engine.zero_stage={stage}"] for form, options in forms.items() for stage in stages[form]
    ]
    two_ranks("tests/launch/many.py", many(config, runs, tmp_path))
    for form in forms:
        first, *others = (tmp_path / "runs" / f"{form}-{stage}" for stage in stages[form])
        for run in others:
            other_sums = {"bfloat16-3": 2**-12, "float16-3": 2**-15}
            assert losses_of(run) == pytest.approx(losses_of(first), rel=other_sums.get(run.name, 1e-6)), run.name
            if form == "float16":
                assert losses_of(run)[:2] == pytest.approx(losses_of(first)[:2], rel=1e-6), run.name  # of the first update B was zero
            answers = [[row["answer"] for row in read_jsonl(one / "samples" / "after.jsonl")] for one in (run, first)]
            assert answers[0] == answers[1] and len(answers[0]) == 5, run.name


def test_batch_norms_statistics_are_one_on_all_ranks(config, tmp_path):
    """Each rank sees other pictures; the mean of their statistics is the model's, at every stage."""
    from safetensors.torch import load_file

    from tests.pretrained import language_model, vision_encoder
    from vlm_dist.models.compose import compose

    compose(vision_encoder(tmp_path, "resnet"), language_model(tmp_path, "chat"), tmp_path / "base")
    model = [f"model.name={tmp_path / 'base'}", "model.load_in_4bit=false", "lora=null", "training.micro_batch=1"]
    runs = [[*model, f"name=norm-{stage}", f"engine.zero_stage={stage}"] for stage in (0, 2, 3)]
    two_ranks("tests/launch/many.py", many(config, runs, tmp_path))
    found = [tmp_path / "runs" / f"norm-{stage}" for stage in (0, 2, 3)]
    stored = [load_file(run / "model" / "model.safetensors") for run in found]
    names = [name for name in stored[0] if "running" in name]
    moved = load_file(tmp_path / "base" / "model.safetensors")
    assert names and not any(torch.equal(stored[0][name], moved[name]) for name in names)
    for run, weights in zip(found[1:], stored[1:], strict=True):
        assert losses_of(run) == pytest.approx(losses_of(found[0]), rel=1e-4)
        for name in names:
            torch.testing.assert_close(weights[name], stored[0][name], rtol=1e-4, atol=1e-6)


def test_a_rank_with_text_alone_beside_one_with_pictures(config, reference, shards, qwen, tmp_path):
    """Every other sample has no picture, one sample a micro-batch: at no stage does a rank wait for a vision tower that another skips."""
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "text.tar")) as tar:
        for number in range(60):
            turns = [{"role": "user", "content": f"What is {number} + 1?"}, {"role": "assistant", "content": str(number + 1)}]
            tar.write({"__key__": f"text-{number}", "json": {"messages": turns}})
    data = [f"model.name={qwen}", f"data.train={json.dumps([*shards['qa-train'], str(tmp_path / 'text.tar')])}", "training.steps=6"]
    runs = [[*data, f"name=mixed-{stage}", f"engine.zero_stage={stage}", "training.micro_batch=1"] for stage in (0, 1, 2, 3)]
    two_ranks("tests/launch/many.py", many(config, runs, tmp_path))
    expected = reference("mixed-here", *data)
    for stage in (0, 1, 2, 3):
        assert losses_of(tmp_path / "runs" / f"mixed-{stage}") == pytest.approx(expected, rel=1e-4), stage


def test_held_out_samples_that_ranks_have_unequally(config, shards, llava, tmp_path):
    """Text alone, no question, an odd number, answers of other lengths: no rank waits in an evaluation for what another does not run; all
    others are scored."""
    from webdataset.writer import TarWriter

    model = shutil.copytree(llava, tmp_path / "llava")
    generation = json.loads((model / "generation_config.json").read_text())
    ends = 209  # the first token that this model answers to "red" and a red picture; to "What is 1 + 1?" and that it is none of them
    (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": ends}))
    turns = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    with TarWriter(str(tmp_path / "odd.tar")) as tar:
        for number in range(4):
            tar.write({"__key__": f"odd-{number}", "json": {"messages": turns[1:] if number == 1 else turns}})
        Image.new("RGB", (32, 32), "red").save(picture := io.BytesIO(), "PNG")
        for number, question in enumerate(["What is 1 + 1?", "red"], 4):
            asked = [{"role": "user", "content": question}, turns[1]]
            tar.write({"__key__": f"odd-{number}", "png": picture.getvalue(), "json": {"messages": asked}})
        for raw in read_in_order(shards["qa-heldout"][:1]):
            tar.write({name: raw[name] for name in ("__key__", "jpg", "json")})
            break
    evaluation = ["evaluation.samples=7", "evaluation.batch_size=1", "evaluation.max_new_tokens=8", "health.timeout_s=60"]
    data = [
        f"model.name={model}",
        f"data.heldout={json.dumps([str(tmp_path / 'odd.tar')])}",
        *evaluation,
        "training.steps=1",
        "training.micro_batch=2",
    ]
    small = {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    sharded = f"engine.deepspeed={json.dumps({'zero_optimization': small})}"  # else weights as small as these are not shared out
    runs = [[*data, f"name=uneven-{stage}", f"engine.zero_stage={stage}", *[sharded] * (stage == 3)] for stage in (0, 3)]
    two_ranks("tests/launch/many.py", many(config, runs, tmp_path))
    for stage in (0, 3):
        run = tmp_path / "runs" / f"uneven-{stage}"
        rows = {row["number"]: row["answer"] for row in read_jsonl(run / "samples" / "before.jsonl")}
        assert list(rows) == [0, 2, 3, 4, 5, 6] and 3 * len(rows[5]) < len(rows[4])  # the ranks' answers at the same time
        assert [(row["key"], row["reason"]) for row in read_jsonl(run / "quarantine.jsonl")] == [
            ("odd-1", "no question stands before the answer")
        ]


def test_resuming_at_other_world_sizes_and_stages(config, reference, tmp_path):
    """(2 ranks, stage 2) -> (1, 0) -> (2, 3) -> (2, 1) -> (1, 0): stopped by SIGTERM to one rank in the middle of an epoch each time,
    over the end of the epoch; the curve is that of one process that never stopped, and every sample was used once."""
    more = ["name=changing", "training.steps=34"]
    two = [*more, "training.micro_batch=2"]
    two_ranks("tests/launch/many.py", many(config, [[*two, "engine.zero_stage=2"]], tmp_path, {0: 5}))
    state = tmp_path / "runs" / "changing" / "summary.json"
    assert json.loads(state.read_text())["step"] == 5 and json.loads(state.read_text())["signal"] == "SIGTERM"
    stopped_at(config, 12, more)
    runs = [[*two, "engine.zero_stage=3"], [*two, "engine.zero_stage=1"]]
    two_ranks("tests/launch/many.py", many(config, runs, tmp_path, {0: 7, 1: 9}))
    assert json.loads(state.read_text())["step"] == 28
    train(load_config(config, more))
    assert losses_of(tmp_path / "runs" / "changing") == pytest.approx(reference("whole", "training.steps=34"), rel=1e-4)
    assert json.loads(state.read_text())["samples"] == 4 * 34


def test_a_packed_mixture_goes_on_with_fewer_ranks(config, reference, shards, qwen, tmp_path):
    """Two data sets of unequal weight, several samples a row, M-RoPE: stopped on two ranks in the middle of an epoch, continued on one.
    The samples that waited for a row when it stopped are used once, and the curve is that of one process that never stopped."""
    mixture = {"qa": {"shards": shards["qa-train"], "weight": 2}, "captions": {"shards": shards["caption-train"]}}
    packed = [f"model.name={qwen}", f"data.train={json.dumps(mixture)}", "data.packing=true", "data.pack_lookahead=8", "training.steps=12"]
    runs = [[*packed, "name=packed", "training.micro_batch=1"]]
    two_ranks("tests/launch/many.py", many(config, runs, tmp_path, {0: 10}))
    state = tmp_path / "runs" / "packed" / "summary.json"
    assert json.loads(state.read_text())["step"] == 5  # of two micro-batches each
    train(load_config(config, [*packed, "name=packed", "training.micro_batch=2"]))
    expected = reference("whole-packed", *packed)
    assert losses_of(tmp_path / "runs" / "packed") == pytest.approx(expected, rel=1e-4)
    ours, theirs = (read_jsonl(tmp_path / "runs" / name / "metrics.jsonl")[-1] for name in ("packed", "whole-packed"))
    assert (ours["samples"], ours["tokens"]) == (theirs["samples"], theirs["tokens"]) and ours["samples"] > 12 * 4
    assert ours["loss_by_dataset"] == pytest.approx(theirs["loss_by_dataset"], rel=1e-4) and set(ours["loss_by_dataset"]) == set(mixture)
    on_two = read_jsonl(tmp_path / "runs" / "packed" / "metrics.jsonl")[0]["imbalance"]
    assert 0 <= on_two["tokens"] < 0.5 and theirs["imbalance"] == {"tokens": 0.0, "patches": 0.0}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_that_is_told_to_stop(config, tmp_path, launcher):
    """SIGTERM to the launcher's process group, as a scheduler sends with a grace period: the ranks stop at the same step, save, and are
    gone. (On one host the deepspeed command does not hand on a SIGTERM that it alone gets.) `vlm-dist launch` starts torchrun. A second
    deepspeed start on the same port ends, with a line of each rank, and does the first no harm."""
    more = ["training.micro_batch=1", "training.steps=5000", "name=told"]
    if launcher == "torchrun":
        process = start(*command("launch", config, *more, "--torchrun", "--gpus", "2"))
    else:
        process = start(BIN / "deepspeed", "--num_gpus", "2", "--master_port", port(10), "launch/train.py", "--config", config, *more)
    run = tmp_path / "runs" / "told"
    wait_for_steps(run, process)
    if launcher == "deepspeed":
        words = ["--num_gpus", "2", "--master_port", port(10), "launch/train.py", "--config", config, *more, "name=second"]
        second = start(BIN / "deepspeed", *words)
        output, _ = second.communicate(timeout=400)
        assert second.returncode == 6 and f"port {port(10)} (MASTER_PORT) of this machine is in use" in output, output
        assert "meets; it leaves without harm" in output and "Traceback" not in output and process.poll() is None, output
        assert not (tmp_path / "runs" / "second").exists()
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=400)  # until the last rank has closed its output
    summary = json.loads((run / "summary.json").read_text())
    assert process.returncode != 0 and summary["ended"] == "interrupted" and summary["signal"] == "SIGTERM"
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert checkpoint.name == f"step-{summary['step']:08d}" and verify_checkpoint(checkpoint) is None


def wait_for_steps(run: Path, process: subprocess.Popen) -> None:
    metrics = run / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 3:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step in 600 s")


def stopped_at(config: str, step: int, overrides: list[str]) -> None:
    """A run in this process that is asked to stop after this step."""
    step_metrics = outcome.step_metrics

    def stop(progress, *rest):
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_metrics(progress, *rest)

    outcome.step_metrics = stop
    try:
        assert train(load_config(config, overrides))["step"] == step
    finally:
        outcome.step_metrics = step_metrics


def test_several_agents_and_hosts(config, reference, tmp_path):
    """torchrun with a rendezvous of two agents, and the deepspeed launcher with two hosts in its hostfile, one rank each."""
    arguments = ["launch/train.py", "--config", config, "training.micro_batch=1"]
    endpoint = f"127.0.0.1:{port(1)}"
    agents = [
        start(BIN / "torchrun", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
              "--rdzv-id", "test", *arguments, "name=agents")
        for _ in range(2)
    ]  # fmt: skip
    for agent in agents:
        finish(agent)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    hosts = [
        start(BIN / "deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", str(number), "--master_addr", "127.0.0.1",
              "--master_port", port(2), *arguments, "name=hosts")
        for number in range(2)
    ]  # fmt: skip
    for host in hosts:
        finish(host)
    expected = reference("here")
    for name in ("agents", "hosts"):
        run = tmp_path / "runs" / name
        assert json.loads((run / "environment.json").read_text())["ranks"] == 2
        assert losses_of(run) == pytest.approx(expected, rel=1e-4)


def test_a_spoiled_step_and_a_slow_rank(config, tmp_path):
    """What befalls one of two ranks is known to both: the step is left out on both; the slow one is named."""
    runs = [[f"name=nan-{stage}", f"engine.zero_stage={stage}", "training.micro_batch=1"] for stage in (0, 1, 2, 3)]
    runs.append(["name=slow", "training.steps=25", "training.micro_batch=2"])
    faults = {**dict.fromkeys(range(4), "nan"), 4: "slow"}
    output = two_ranks("tests/launch/many.py", many(config, runs, tmp_path, faults))
    for stage in range(4):
        run = tmp_path / "runs" / f"nan-{stage}"
        losses = losses_of(run)
        assert losses[1] is None and None not in losses[2:], output[-2000:]
        (event,) = events(run)
        assert event["event"] == "skipped" and len(event["samples"]) == 1
        assert json.loads((run / "summary.json").read_text())["skipped_steps"] == 1
    (event,) = events(tmp_path / "runs" / "slow")
    assert event["event"] == "slow rank" and event["rank"] == 1 and event["busy_s"] > 0.1


def events(run: Path) -> list[dict]:
    return [row for row in read_jsonl(run / "events.jsonl") if row["event"] != "checkpoint"]


@pytest.mark.skipif(shutil.which("py-spy", path=f"{BIN}:{os.environ['PATH']}") is None, reason="py-spy is not installed here")
def test_a_hung_rank_ends_the_run_by_name(config, tmp_path):
    """SIGSTOP to one of two ranks: within the timeout the other says which one, keeps the stacks of both, and both are gone."""
    process = torchrun("launch/train.py", "--config", config, "training.micro_batch=1", "training.steps=5000", "health.timeout_s=5",
                       "name=hung", offset=4)  # fmt: skip
    logs = tmp_path / "runs" / "hung" / "logs"
    wait_for_steps(tmp_path / "runs" / "hung", process)
    victim = json.loads((logs / "rank-1.alive.json").read_text())["pid"]
    os.kill(victim, signal.SIGSTOP)
    output = finish(process, 1)
    assert "no progress for 5 s" in output and f"rank 1 ({os.uname().nodename}, process {victim}) has not been heard of" in output
    summary = json.loads((tmp_path / "runs" / "hung" / "summary.json").read_text())
    assert summary["ended"] == "failed" and "rank 1" in summary["reason"]
    assert "_run_loop" in (logs / "rank-0.stacks.txt").read_text() and "_run_loop" in (logs / "rank-1.stacks.txt").read_text()
    assert not Path(f"/proc/{victim}").exists()


def test_zero_3_shards_the_4_bit_base(config, tmp_path):
    """Each of two ranks holds half of the NF4 base, nothing whole while it waits, and no more than the layer it computes."""
    thresholds = dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
    )
    options = [
        "engine.zero_stage=3",
        "training.global_batch=2",
        "training.micro_batch=1",
        f"engine.deepspeed={json.dumps({'zero_optimization': thresholds})}",
    ]
    output = two_ranks("tests/launch/held.py", config, *options)
    held = json.loads(re.search(r"HELD (.*)", output)[1])
    assert len(held["ranks"]) == 2
    for rank in held["ranks"]:
        assert rank["share"] == pytest.approx(rank["whole"] / 2, rel=0.01) and rank["at_rest"] == 0
        assert rank["most_gathered"] <= 1.05 * held["largest"] < 0.5 * rank["whole"]


def test_what_launch_and_train_refuse(config, capsys):
    assert main(["train", config, "--preflight", "--dry-run"]) == 2 and "give one of the two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["launch", config, "--torchrun", "--port", "99999", "--print"])
    assert "is no port" in capsys.readouterr().err


def test_a_dry_run_for_ray_is_of_its_workers(config, capsys, monkeypatch):
    """Whatever RANK is left over in the driver's shell: it is none of them, and asks no other."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port(14))):
        monkeypatch.setenv(name, value)
    words = ["--config", config, "--dry-run", "training.micro_batch=1"]
    assert launch(None, run_on_ray, [*words, "ray.workers=4"], among_ranks=False) == 0 and "all checks passed" in capsys.readouterr().out
    assert launch(None, run_on_ray, [*words, "ray.workers=3"], among_ranks=False) == 2
    assert "micro_batch x ranks" in (told := capsys.readouterr().err) and "rank 0" not in told


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--deepspeed", "--gpus", "2", "--port", "9"], ["deepspeed --master_port 9 --num_gpus 2 launch/train.py --config"]),
        (["--deepspeed", "--gpus", "2", "--nodes", "2", "--head", "a"], ["--hostfile hostfile --num_nodes 2 --master_addr a --num_gpus 2"]),
        (["--torchrun", "--nodes", "2", "--head", "a"], ["--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:2", "--rdzv-id tiny-2"]),
        (
            ["--slurm", "--gpus", "2", "--nodes", "2"],
            ["sbatch --job-name=tiny --nodes=2 --ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=8"],
        ),
        (["--slurm", "--gpus", "2", "--cpus", "4"], ["--gpus-per-node=2 --cpus-per-task=4 --time=24:00:00"]),
        (["--slurm", "--gpus", "2", "--port", "31234"], [",VLM_DIST_PORT=31234 "]),
        (["--torchrun", "--gpus", "2", "--port", "31234"], ["torchrun --nproc-per-node 2 --master-port 31234 launch/train.py"]),
        (["--ray", "--gpus", "4"], ["launch/ray_train.py --config", "optim.lr=0.1", "ray.workers=4"]),
        (
            ["--ray", "--gpus", "1", "--address", "http://127.0.0.1:8265"],
            ["ray job submit --address http://127.0.0.1:8265", '"RAY_JOB_STOP_WAIT_TIME_S": "30"', "ray.workers=1"],
        ),
    ],
)
def test_launch_prints_the_command(config, capsys, options, expected):
    assert main(["launch", config, "optim.lr=0.1", "training.micro_batch=1", *options, "--print"]) == 0
    shown = capsys.readouterr().out
    assert all(part in shown for part in expected), shown


def test_each_start_on_one_node_has_a_port_of_its_own(config, capsys):
    """On several nodes all come to the same one without asking, another run to another one."""
    ports = []
    for options in (["--gpus", "2"], ["--gpus", "2"], ["--nodes", "2", "--head", "a"], ["--nodes", "2", "--head", "a"],
                    ["--nodes", "2", "--head", "a", "name=other"]):  # fmt: skip
        assert main(["launch", config, "training.micro_batch=1", "--deepspeed", "--print", *options]) == 0
        ports.append(re.search(r"--master_port (\d+)", capsys.readouterr().out)[1])
    assert len(set(ports[:3])) == 3 and ports[2] == ports[3] != ports[4]


def test_a_mistake_on_two_ranks_is_told_once(config):
    """However often torchrun starts them again."""
    process = torchrun("--max-restarts", "2", "launch/train.py", "--config", config, "optim.lrr=1", offset=12)
    assert finish(process, 1).count("optim.lrr") == 1


def test_launch_refuses_what_cannot_be(config, capsys):
    for options, told in (
        (["--ray", "--gpus", "1", "--address", "http://127.0.0.1:1", "output_dir=runs"], "output_dir: 'runs' would lie in the copy"),
        (["--ray", "--gpus", "1", "--address", "http://127.0.0.1:1"], "is outside of this folder"),
        (["--slurm", "--nodes", "2"], "--gpus: this machine has no GPU to count"),
        (["--ray", "--port", "31234"], "--port: nothing heeds it with --ray; leave it out"),
        (["--torchrun", "--head", "a"], "--head: nothing heeds it with --torchrun on one node"),
        (["--torchrun", "--nodes", "2", "--head", "a", "--hostfile", "h"], "--hostfile: nothing heeds it with --torchrun; "),
        (["--deepspeed", "--time", "1:00"], "--time: nothing heeds it"),
        (["--ray", "--cpus", "4"], "--cpus: nothing heeds it"),
        (["--slurm", "--address", "http://a"], "--address: nothing heeds it"),
    ):
        path = os.path.relpath(config) if "outside" in told else config
        assert main(["launch", path, *options, "--print"]) == 2 and told in capsys.readouterr().err
    assert main(["launch", config, "--torchrun", "--gpus", "3", "--print"]) == 2
    assert "is not a multiple of micro_batch x ranks" in capsys.readouterr().err
    assert main(["launch", config, "training.micro_batch=1", "--torchrun", "--gpus", "2", "--nodes", "2", "--print"]) == 2
    assert "--head" in capsys.readouterr().err
