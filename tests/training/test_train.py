"""The main job on tiny real checkpoints: real NF4, real DeepSpeed, real shards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, child_environment, losses_of, run_command, start_command, write_config
from tests.warm import Warm
from vlm_dist import load_config, train

pytestmark = pytest.mark.slow


def run(settings, tmp_path, *overrides):
    return train(load_config(write_config(settings, tmp_path), overrides))


def run_dir(settings) -> Path:
    return Path(settings["output_dir"]) / settings["name"]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_qlora_run_leaves_everything(settings, tmp_path, family, llava, qwen):
    settings["model"]["name"] = {"llava": llava, "qwen2_5_vl": qwen}[family]
    summary = run(settings, tmp_path, "evaluation.every=2")
    folder = run_dir(settings)
    assert summary["ended"] == "finished" and summary["step"] == 4 and summary["samples"] == 16
    assert set(summary["eval"]) == {"before", "during", "after"} and len(summary["eval"]["during"]) == 1
    assert summary["eval"]["before"]["exact_match"] >= 0 and summary["wall_s"] > 0
    assert json.loads((folder / "summary.json").read_text()) == summary
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "logs/rank-0.log", "samples/before.jsonl", "samples/after.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert {path.name for path in (folder / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    rows = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    needed = {"step", "loss", "lr", "grad_norm", "samples", "tokens", "label_tokens", "tokens_per_s", "step_s", "data_wait_s"}
    assert needed | {"padding_fraction", "peak_memory_bytes"} <= set(rows[0])
    assert all(row["grad_norm"] > 0 for row in rows)


def test_the_first_step_names_what_gets_no_gradient(settings, tmp_path, monkeypatch):
    """All is well: one line. A layer that the forward pass goes around: its adapters by name."""
    from vlm_dist.training import train as loop

    run(settings, tmp_path)
    assert "first step: all 40 trainable tensors have a gradient; " in (run_dir(settings) / "logs" / "rank-0.log").read_text()

    load = loop.load_trainable

    def starved(*arguments):
        loaded = load(*arguments)
        layer = loaded.model.get_decoder().layers[1]
        layer.mlp.down_proj.forward = lambda x: 0 * x.detach()[..., : layer.hidden_size]
        return loaded

    monkeypatch.setattr(loop, "load_trainable", starved)
    run(settings, tmp_path, "name=starved", "kernels=off")
    events = [json.loads(line) for line in (tmp_path / "runs" / "starved" / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "no gradient"]
    assert "(language): model.language_model.layers.1.mlp." in told["text"] and len(told["names"]) == 6


def test_adapter_loads_with_plain_peft_and_answers_the_same(settings, tmp_path, llava):
    """The exported adapter on a fresh 4-bit base gives the logits of `load_trained`, and those differ from the base's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

    from vlm_dist.models.trained import load_trained

    run(settings, tmp_path, "optim.lr=0.05")
    adapter = run_dir(settings) / "adapter"
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32, llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    processor = AutoProcessor.from_pretrained(adapter)
    ids = processor.tokenizer("What colour is it?", return_tensors="pt").input_ids
    base = AutoModelForImageTextToText.from_pretrained(llava, quantization_config=quantisation).train()
    with torch.no_grad():
        of_base = base(input_ids=ids).logits.clone()
        plain = PeftModel.from_pretrained(base, adapter).train()(input_ids=ids).logits
        ours = load_trained(str(run_dir(settings)), torch.device("cpu"))[0](input_ids=ids).logits
    torch.testing.assert_close(plain, ours)
    assert (plain - of_base).abs().max() > 1e-3


@pytest.mark.parametrize("stage", [0, 3])
def test_full_training_learns_and_its_model_loads(settings, tmp_path, stage):
    """From random weights, with the vision tower frozen: the loss falls, frozen weights stay, plain transformers loads the result."""
    from transformers import AutoModelForImageTextToText

    settings.update(lora=None, model={"name": settings["model"]["name"], "load_in_4bit": False, "freeze": ["vision"]})
    run(settings, tmp_path, "optim.lr=3e-3", "training.steps=30", "optim.warmup_steps=2", f"engine.zero_stage={stage}")
    losses = losses_of(run_dir(settings))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    before = AutoModelForImageTextToText.from_pretrained(settings["model"]["name"]).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(run_dir(settings) / "model").state_dict()
    assert {name: tensor.shape for name, tensor in before.items()} == {name: tensor.shape for name, tensor in after.items()}
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed) and "lm_head.weight" in changed


def test_from_scratch(settings, tmp_path):
    scratch = {"image_size": 32, "patch_size": 16, "vision_width": 32, "vision_layers": 1, "language_width": 32, "language_layers": 1}
    settings.update(lora=None, model={"scratch": {**scratch, "heads": 2, "vocab_size": 300}, "load_in_4bit": False})
    assert run(settings, tmp_path)["result"].endswith("model")


@pytest.mark.parametrize("options", [["optim.name=adamw_8bit"], ["model.gradient_checkpointing=true"], ["model.dtype=bfloat16"]])
def test_options_train(settings, tmp_path, options):
    assert run(settings, tmp_path, *options)["ended"] == "finished"
    assert all(loss < 20 for loss in losses_of(run_dir(settings)))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("options", [["lora.projector=full"], ["lora.projector=lora"], ["lora.rslora=true", "lora.dora=true"]])
def test_forms_of_lora_train_resume_and_load(settings, tmp_path, options, family, llava, qwen):
    """The checkpoint of step 2 continues with the same losses, and the exported adapter scores as the run did."""
    import shutil

    import torch

    from vlm_dist.models.trained import load_trained
    from vlm_dist.scoring.score import score_run

    settings["model"]["name"] = {"llava": llava, "qwen2_5_vl": qwen}[family]
    options = [*options, "optim.lr=0.01"]
    run(settings, tmp_path, *options)
    folder = run_dir(settings)
    expected = losses_of(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / "summary.json").unlink()
    summary = run(settings, tmp_path, *options)
    assert losses_of(folder) == pytest.approx(expected, rel=1e-5)
    rows = [json.loads(line) for line in (folder / "samples" / "after.jsonl").read_text().splitlines()]
    assert {**score_run(str(folder), samples=4), "step": 4} == summary["eval"]["after"]
    model = load_trained(str(folder), torch.device("cpu"))[0]
    kinds = {"lora.projector=full": "modules_to_save", "lora.projector=lora": "lora_A", "lora.rslora=true": "lora_magnitude_vector"}
    path = "multi_modal_projector" if family == "llava" else "merger"
    wanted = [name for name, _ in model.named_parameters() if kinds[options[0]] in name]
    assert wanted and (any(path in name for name in wanted) or "rslora" in options[0])
    assert len(rows) == 4


def test_each_side_has_its_learning_rate(settings, tmp_path):
    """With next to none for the vision tower, its lora_B stays at zero while the language model's moves."""
    from safetensors.torch import load_file

    run(settings, tmp_path, "optim.lr=0.01", "optim.lr_vision=1e-12")
    weights = load_file(run_dir(settings) / "adapter" / "adapter_model.safetensors")
    moved = {
        side: max(w.abs().max() for name, w in weights.items() if "lora_B" in name and side in name) for side in ("vision", "language")
    }
    assert moved["vision"] < 1e-9 < 1e-3 < moved["language"]


def test_gradient_checkpointing_and_accumulation_change_no_number(settings, tmp_path):
    """4 x 1, 2 x 2 and 1 x 4 micro-batches, and recomputation: the losses of the same run (uneven answers)."""
    expected = None
    for number, options in enumerate((["micro_batch=4"], ["micro_batch=2"], ["micro_batch=1"], ["micro_batch=2", "checkpointing"])):
        overrides = [f"training.{option}" for option in options if "=" in option] + [f"name=run-{number}"]
        overrides += ["model.gradient_checkpointing=true"] if "checkpointing" in options else []
        run(settings, tmp_path, *overrides)
        losses = losses_of(Path(settings["output_dir"]) / f"run-{number}")
        expected = expected or losses
        assert losses == pytest.approx(expected, rel=2e-5)


def test_resuming_gives_the_losses_of_an_uninterrupted_run(settings, tmp_path, monkeypatch):
    """Stopped after step 5 by a signal, then the same command again, with dropout: rtol 1e-5."""
    overrides = ["training.steps=9", "lora.dropout=0.1"]
    run(settings, tmp_path, *overrides, "name=whole")
    from vlm_dist.training import train as loop

    step_metrics = loop.outcome.step_metrics

    def stop_after_five(progress, *rest):
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_metrics(progress, *rest)

    monkeypatch.setattr(loop.outcome, "step_metrics", stop_after_five)
    summary = run(settings, tmp_path, *overrides)
    assert summary["ended"] == "interrupted" and summary["signal"] == "SIGTERM" and summary["step"] == 5
    monkeypatch.undo()
    summary = run(settings, tmp_path, *overrides)
    assert summary["ended"] == "finished"
    whole = Path(settings["output_dir"]) / "whole"
    assert losses_of(run_dir(settings)) == pytest.approx(losses_of(whole), rel=1e-5)
    assert summary["samples"] == 36 and summary["eval"]["before"] is not None


@pytest.mark.parametrize(("stage", "optimizer"), [(0, "adamw"), (0, "adamw_8bit"), (1, "adamw"), (2, "adamw"), (3, "adamw")])
def test_resuming_at_every_zero_stage(settings, tmp_path, stage, optimizer):
    """The checkpoint of step 2, continued, gives the losses that the run itself went on to."""
    import shutil

    overrides = [f"engine.zero_stage={stage}", f"optim.name={optimizer}"]
    run(settings, tmp_path, *overrides)
    folder = run_dir(settings)
    expected = losses_of(folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    (folder / "summary.json").unlink()
    run(settings, tmp_path, *overrides)
    assert losses_of(folder) == pytest.approx(expected, rel=1e-5)


def test_finished_run_is_not_trained_again(settings, tmp_path):
    run(settings, tmp_path)
    stamp = (run_dir(settings) / "metrics.jsonl").stat().st_mtime_ns
    assert run(settings, tmp_path)["already_finished"]
    assert (run_dir(settings) / "metrics.jsonl").stat().st_mtime_ns == stamp


def wait_for_steps(folder: Path, steps: int, process: Warm) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and len(losses_of(folder)) >= steps:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pytest.fail("no step in time")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_to_the_command(settings, tmp_path, number):
    """SIGTERM and Ctrl-C save and end by 128 + signal; kill -9 loses what came after the last checkpoint; each continues exactly."""
    config = str(write_config(settings, tmp_path))
    long = ["training.steps=200", "checkpoint.save_every=2", "data.heldout=[]"]
    process = start_command("train", config, *long)
    folder = run_dir(settings)
    wait_for_steps(folder, 5, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=400)
    before = losses_of(folder)
    assert len(before) < 200
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number, errors
        assert json.loads((folder / "summary.json").read_text())["ended"] == "interrupted"
        assert "Run the same command again to continue" in output
        assert "Traceback" not in errors
    # continue in this process, which stops by itself two steps later
    from vlm_dist.training import train as loop

    done = int(sorted((folder / "checkpoints").glob("step-*"))[-1].name[5:])
    step_metrics = loop.outcome.step_metrics

    def stop(progress, *rest):
        if progress.step == done + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_metrics(progress, *rest)

    loop.outcome.step_metrics = stop
    try:
        summary = run(settings, tmp_path, *long)
    finally:
        loop.outcome.step_metrics = step_metrics
    assert summary["step"] == done + 2
    after = losses_of(folder)
    assert after[: min(len(before), done + 2)] == pytest.approx(before[: done + 2], rel=1e-5)


@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_launchers_give_the_same_losses(settings, tmp_path, launcher):
    """launch/train.py: two ranks under deepspeed, one under python; against this process. tests/launch has the other launchers."""
    config = str(write_config(settings, tmp_path))
    settings["data"]["heldout"] = []
    run(settings, tmp_path, "name=here", "data.heldout=[]")
    bin_folder = Path(sys.executable).parent
    starts = {
        "python": [sys.executable],
        "deepspeed": [str(bin_folder / "deepspeed"), "--num_gpus", "2", "--master_port", str(20000 + os.getpid() % 20000)],
    }
    arguments = ["launch/train.py", "--config", config, "data.heldout=[]"]
    environment = child_environment(PATH=f"{bin_folder}:{os.environ['PATH']}")
    result = subprocess.run(
        [*starts[launcher], *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    expected = losses_of(Path(settings["output_dir"]) / "here")
    assert losses_of(run_dir(settings)) == pytest.approx(expected, rel=1e-4)


def test_generate_and_eval_commands(settings, tmp_path, capsys):
    from vlm_dist.cli.main import main

    run(settings, tmp_path)
    folder = str(run_dir(settings))
    picture = str(next((run_dir(settings) / "samples" / "thumbnails").glob("*.png")))
    capsys.readouterr()
    assert main(["generate", folder, "--image", picture, "--prompt", "How many shapes are there?", "--max-new-tokens", "3", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"prompt", "images", "answer"}
    assert main(["generate", settings["model"]["name"], "--image", picture, "--prompt", "What?", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert main(["eval", folder, "--samples", "4", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["samples"] == 4
    assert {**scores, "step": 4} == json.loads((run_dir(settings) / "summary.json").read_text())["eval"]["after"]
    assert main(["generate", folder, "--image", "nowhere.jpg", "--prompt", "What?"]) == 3
    assert "nowhere.jpg" in capsys.readouterr().err


def test_wandb_offline_writes_and_a_failure_does_not_end_the_run(settings, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    run(settings, tmp_path, "log.wandb=offline", "name=with-wandb")
    assert list((Path(settings["output_dir"]) / "with-wandb" / "wandb").glob("offline-run-*/*.wandb"))
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no network")))
    assert run(settings, tmp_path, "log.wandb=offline", "name=without")["ended"] == "finished"
    assert "Weights & Biases failed (no network)" in (Path(settings["output_dir"]) / "without" / "logs" / "rank-0.log").read_text()


def test_dry_run_of_the_7b_config(shards, tmp_path):
    """Loads no weights: works here for a model that does not fit here."""
    data = [f"data.train=[{', '.join(shards['qa-train'])}]", f"data.heldout=[{', '.join(shards['qa-heldout'])}]"]
    result = run_command("train", "configs/qwen2_5_vl_7b_qlora.yaml", "--dry-run", "--json", f"output_dir={tmp_path}", *data)
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    assert plan["train_samples"] == 60 and plan["steps"] == 4 and plan["accumulation_rounds"] == 16
    assert not (tmp_path / "qwen2_5_vl_7b_qlora").exists()
