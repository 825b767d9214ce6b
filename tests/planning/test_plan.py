"""`vlm-dist plan`, what `train` makes of it, and the rehearsal of the fullest micro-batch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from tests.conftest import losses_of, write_config
from vlm_dist import load_config, train
from vlm_dist.cli.main import main
from vlm_dist.distributed import Ranks
from vlm_dist.errors import ConfigError, MachineError
from vlm_dist.inputs.opened import open_inputs
from vlm_dist.inputs.workload import assumed, micro_batch
from vlm_dist.models.load import read_model_config
from vlm_dist.planning.count import count_micro_batch
from vlm_dist.planning.fits import check_fits
from vlm_dist.planning.gpus import GPUS, Gpu, find_gpu
from vlm_dist.planning.plan import MODES, best_of, make_plan, open_planner
from vlm_dist.planning.sharing import numbers, plan_shared
from vlm_dist.run_dir import RunDir
from vlm_dist.testing.full_size import full_size_config

pytestmark = pytest.mark.slow
ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def small_gpu(memory: float) -> Gpu:
    return Gpu("small", int(memory), 1e12, 1e11, 1e10)


def test_the_command(settings, tmp_path, capsys):
    config = str(write_config(settings, tmp_path))
    assert main(["plan", config, "--gpu", "h100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    own = plan["own"]
    assert own["total"] == sum(own["memory"].values()) < plan["gpu"]["memory"] == GPUS["h100"].memory
    assert plan["row"]["pictures"] == [[32, 32]] and "samples" in plan["row"]["why"]
    assert [choice["gradient_checkpointing"] for choice in plan["choices"]] == list(MODES)
    assert all(choice["micro_batch"] == 4 and choice["fits"] for choice in plan["choices"])
    none, every = plan["choices"][0], plan["choices"][-1]
    assert every["memory"]["activations, language"] < none["memory"]["activations, language"]
    assert every["flops"]["backward"] > none["flops"]["backward"] and every["flops"]["forward"] == none["flops"]["forward"]
    step = own["step_s"]
    assert 0 < step["limit"] < step["fast"] < step["slow"] and own["micro_batches_a_step"] == 2
    assert main(["plan", config, "--quick"]) == 0
    shown = capsys.readouterr().out
    assert "fits:" in shown and "rtx4090" in shown and "what fits" not in shown


def test_rows_that_two_share(settings, tmp_path, capsys):
    """What the language model keeps is divided; what is sent is told; a family whose rows cannot be cut is refused."""
    config = str(write_config(settings | {"training": {"steps": 4, "global_batch": 4, "micro_batch": 4}}, tmp_path))
    plans = []
    for words in (["--gpus", "1"], ["--gpus", "2", "engine.sequence_parallel=2"]):
        assert main(["plan", config, "--quick", "--json", *words]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    whole, half = (plan["own"] for plan in plans)
    assert plans[0]["all_to_all"] == 0 < plans[1]["all_to_all"]
    assert whole["micro_batches_a_step"] == half["micro_batches_a_step"] == 1
    kept = [own["memory"]["activations, language"] for own in (whole, half)]
    assert 0.5 * kept[0] < kept[1] < 0.75 * kept[0]  # not half: pictures are placed in whole rows, and this part has most labels
    assert half["memory"]["activations, vision"] == pytest.approx(0.5 * whole["memory"]["activations, vision"], rel=0.2)
    assert half["flops"]["vision"] == pytest.approx(0.5 * whole["flops"]["vision"], rel=0.2)
    assert main(["plan", config, "--quick", "--gpus", "3", "engine.sequence_parallel=3", "training.global_batch=4"]) == 2
    assert "engine.sequence_parallel=3: does not divide the 4 attention heads" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["gemma4_moe", "glm4v", "mini_vlm"])
def test_rows_of_every_kind_of_tower_can_be_planned(settings, tmp_path, capsys, checkpoint, family):
    settings["model"]["name"] = checkpoint(family)
    config = str(write_config(settings | {"training": {"steps": 4, "global_batch": 4, "micro_batch": 4}}, tmp_path))
    owns = []
    for words in (["--gpus", "1"], ["--gpus", "2", "engine.sequence_parallel=2"]):
        assert main(["plan", config, "--quick", "--json", "--size", "64x64", *words]) == 0
        owns.append(json.loads(capsys.readouterr().out)["own"])
    for part in ("vision", "forward", "backward"):
        assert 0.4 < owns[1]["flops"][part] / owns[0]["flops"][part] < 0.7, part


def test_of_pictures_that_are_shared_the_most_count(settings, tmp_path, capsys, qwen):
    """Three over two ranks: the plan is of the rank that has two of them."""
    settings["model"]["name"] = qwen
    config = str(write_config(settings | {"training": {"steps": 4, "global_batch": 4, "micro_batch": 1}}, tmp_path))
    flops = []
    for words in (["--gpus", "1"], ["--gpus", "2", "engine.sequence_parallel=2"]):
        assert main(["plan", config, "--quick", "--json", "--size", "112x112", "--pictures", "3", *words]) == 0
        flops.append(json.loads(capsys.readouterr().out)["own"]["flops"]["vision"])
    assert flops[1] == pytest.approx(flops[0] * 2 / 3, rel=0.1)


def test_auto_shares_a_row_that_fits_no_card(settings, tmp_path, capsys, monkeypatch):
    """By the least number of cards with which it fits; where there are too few, in words."""
    settings["training"] = {"steps": 4, "global_batch": 4, "micro_batch": 1}
    settings["data"] |= {"train": "not-there-yet/*.tar", "max_seq_length": 1024}
    config, least = str(write_config(settings, tmp_path)), {}
    for number in (1, 2):
        shared = load_config(config, [f"engine.sequence_parallel={number}"])
        with open_planner(shared, small_gpu(1), 4, size=(32, 32)) as planner:
            least[number] = min(choice["total"] for choice in planner.choices())
    assert least[1] > least[2]
    monkeypatch.setitem(GPUS, "small", small_gpu(least[2]))
    words = ["plan", config, "--gpu", "small", "--size", "32x32", "--auto", "--out", str(tmp_path / "planned.yaml")]
    assert main([*words, "--gpus", "1"]) == 6 and "or --gpus of a multiple of 2, 4: so many can share a row" in capsys.readouterr().err
    assert main([*words, "--gpus", "4", "training.global_batch=2", "data.max_seq_length=1000"]) == 0  # one row of four has none
    assert "engine.sequence_parallel: 2" in (shown := capsys.readouterr().out) and "a row shared by 2 GPUs" in shown
    planned = load_config(tmp_path / "planned.yaml")
    assert (planned.engine.sequence_parallel, planned.training.global_batch, planned.data.max_seq_length) == (2, 2, 1000)
    monkeypatch.setitem(GPUS, "small", small_gpu(1))
    assert main([*words[:-1], str(tmp_path / "none.yaml"), "--gpus", "4"]) == 6
    assert "at the least, shared by 4 GPUs; lower" in (told := capsys.readouterr().err) and "--gpus of" not in told
    monkeypatch.setitem(GPUS, "small", small_gpu(least[2]))
    with open_planner(planned, GPUS["small"], 4, size=(32, 32)) as planner:
        assert plan_shared(planner, plan := make_plan(planner)) is plan and numbers(planner.inputs, planner.config, 4) == [4]


def test_features_that_are_kept(settings, tmp_path, capsys):
    """The share that is read the second time is the vision tower's; what cannot be kept is refused as in training."""
    settings["lora"] |= {"vision": False}
    config = str(write_config(settings, tmp_path))
    assert main(["plan", config, "--gpu", "h100", "data.cache_features=true"]) == 0
    shown = capsys.readouterr().out
    assert main(["plan", config, "--gpu", "h100", "--json"]) == 0
    flops = json.loads(capsys.readouterr().out)["own"]["flops"]
    share = flops["vision"] / (flops["forward"] + flops["backward"])
    assert f"data.cache_features: for pictures seen before {share:.0%} of it is read" in shown and share > 0.01
    assert main(["plan", config, "--gpu", "h100", "data.cache_features=true", "engine.zero_stage=3"]) == 2
    assert "data.cache_features: at ZeRO stage 3" in capsys.readouterr().err


def test_without_data_pictures_are_assumed(settings, tmp_path, capsys):
    settings["data"]["train"] = "not-there-yet/*.tar"
    config = str(write_config(settings, tmp_path))
    assert main(["plan", config, "--quick", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["row"]
    assert row["tokens"] == 256 and row["pictures"] == [[1024, 1024]] and "cannot be measured" in row["why"]
    assert main(["plan", config, "--quick", "--json", "--size", "64x48", "--pictures", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["row"]["pictures"] == [[64, 48]] * 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "rtx9999"], "no card 'rtx9999' in the table; there are rtx3090"),
        (["--size", "64"], "expected WIDTHxHEIGHT"),
        (["--size", "64x64", "--pictures", "90"], "more than data.max_seq_length=256"),
        (["--gpus", "3"], "training.global_batch=4 is not a multiple"),
        (["--gpus", "0"], "expected --gpus of 1 or more"),
        (["--auto", "--quick"], "give one of the two"),
        (["--auto", "--out", "{config}"], "exists already"),
    ],
)
def test_wrong_input(settings, tmp_path, capsys, arguments, words):
    config = str(write_config(settings, tmp_path))
    assert main(["plan", config, *(word.format(config=config) for word in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_auto_writes_what_fits(llava, shards, tmp_path, capsys):
    text = f"""# A comment that stays.
name: tiny
model: {{name: {llava}}}
data:
  train: {shards["qa-train"][0]}   # and this
training:
  steps: 2
  global_batch: 4
"""
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "mine.yaml"), "--auto"]) == 0
    written = (tmp_path / "mine.planned.yaml").read_text()
    assert "# A comment that stays." in written and "# and this" in written and "training.micro_batch: 4" in capsys.readouterr().out
    config = load_config(tmp_path / "mine.planned.yaml")
    assert config.training.micro_batch == 4 and config.model.gradient_checkpointing is False
    assert main(["plan", str(tmp_path / "mine.yaml"), "--auto"]) == 2  # nothing is overwritten


def test_a_card_between(settings, tmp_path):
    """Where all of it does not fit, the largest micro-batch that does is chosen, and what is recomputed makes room."""
    settings["model"]["dtype"] = "auto"
    settings["training"]["micro_batch"] = 4
    config = load_config(write_config(settings, tmp_path))
    with open_planner(config, find_gpu("rtx4090"), 1) as planner:
        rows = {rows: planner.total(planner.config, planner.count(planner.config, rows)) for rows in (1, 2, 4)}
        planner.gpu = small_gpu((rows[2] + rows[4]) / 2)
        plan = make_plan(planner)
        assert not plan["own"]["fits"]
        chosen = {choice["gradient_checkpointing"]: choice["micro_batch"] for choice in plan["choices"]}
        assert chosen["none"] < 4 and chosen["all"] >= chosen["none"] and best_of(plan)["fits"]
        planner.gpu = small_gpu(1e5)
        with pytest.raises(MachineError, match="nothing fits small"):
            best_of(make_plan(planner))


def test_training_refuses_what_cannot_fit(settings, tmp_path, caplog):
    config = load_config(write_config(settings, tmp_path))
    inputs = open_inputs(config, RunDir(tmp_path / "run"), ALONE)
    check_fits(inputs, ALONE)  # on a CPU nothing is counted
    check_fits(inputs, ALONE, small_gpu(24e9))
    with pytest.raises(
        MachineError, match=r"training.micro_batch=2: loading needs 0.6 GB, a step about 0.6 GB, small has 0.1 \(CUDA itself 0.6.*--auto"
    ):
        check_fits(inputs, ALONE, small_gpu(1e8))
    told = load_config(write_config(settings, tmp_path), ["health.on_too_large=tell"])
    check_fits(replace(inputs, config=told), ALONE, small_gpu(1e8))
    assert "trying it all the same" in caplog.text
    ignored = load_config(write_config(settings, tmp_path), ["health.on_too_large=ignore"])
    check_fits(replace(inputs, config=ignored), ALONE, small_gpu(1))


def test_rows_that_are_packed_are_full(settings, tmp_path):
    config = load_config(write_config(settings, tmp_path), ["data.packing=true", "data.max_seq_length=200"])
    with open_planner(config, find_gpu("l4"), 1) as planner:
        assert planner.workload.tokens == 200 and len(planner.workload.pictures) > 1
        batch = micro_batch(planner.inputs.encoder, planner.workload, 2)
    assert tuple(batch["input_ids"].shape) == (2, 200)
    few = load_config(write_config(settings, tmp_path), ["data.packing=true", "data.max_seq_length=200", "data.max_patches=1"])
    with open_planner(few, find_gpu("l4"), 1) as planner:
        assert len(planner.workload.pictures) == 1


def test_rehearsal_leaves_nothing_behind(settings, tmp_path):
    settings["data"]["heldout"] = []
    settings["lora"]["dropout"] = 0.1
    losses = {}
    for rehearse in ("true", "false"):
        config = load_config(write_config(settings, tmp_path), [f"health.rehearse={rehearse}", f"name=rehearse-{rehearse}"])
        train(config)
        losses[rehearse] = losses_of(tmp_path / "runs" / f"rehearse-{rehearse}")
    assert losses["true"] == losses["false"]
    assert "rehearsed the fullest micro-batch" in (tmp_path / "runs" / "rehearse-true" / "logs" / "rank-0.log").read_text()
    assert "rehearsed" not in (tmp_path / "runs" / "rehearse-false" / "logs" / "rank-0.log").read_text()


def test_a_published_model(tmp_path):
    """Qwen2.5-VL-7B, counted from its config.json: 8.292 billion parameters; LoRA r=16 on its language model has 40.4 million; 4.127 bit
    a weight with double quantisation; a frozen base costs 4 FLOPs a weight and token."""
    folder = full_size_config("qwen2.5-vl-7b", tmp_path / "7b")
    text = {"name": "x", "model": {"name": str(folder), "processor": {"size": {"shortest_edge": 3136, "longest_edge": 802816}}},
            "lora": {"vision": False}, "data": {"train": "x"}, "training": {"steps": 1}}  # fmt: skip
    config = load_config(write_config(text, tmp_path))
    with open_planner(config, find_gpu("h100"), 1, size=(896, 896)) as planner:
        workload = assumed(planner.config, planner.inputs.encoder, (896, 896), 1)
        hf_config, family = read_model_config(config.model, str(folder))
        batch = micro_batch(planner.inputs.encoder, workload, 1)
        counted = count_micro_batch(planner.config, hf_config, family, torch.bfloat16, batch)
    assert sum(counted.trainable) == 40_370_176
    linear = 8 * counted.weights["4-bit"] // 4
    assert linear + counted.weights["16-bit"] // 2 == pytest.approx(8.292e9, rel=0.001)
    assert 8 * (counted.weights["4-bit"] + counted.weights["statistics"]) / linear == pytest.approx(4.127, abs=0.001)
    tokens = batch["input_ids"].numel()
    language = counted.forward_flops - counted.vision_flops
    assert tokens == 2048 and language == pytest.approx(2 * tokens * 6.525e9 + 4 * 1023 * 0.545e9 + 0.84e12, rel=0.05)
    assert counted.vision_flops == pytest.approx(5.65e12, rel=0.15)
    with pytest.raises(ConfigError, match=r"more than data.max_seq_length=2048"):
        assumed(config, planner.inputs.encoder, (896, 896), 3)
