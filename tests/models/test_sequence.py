"""A row cut over ranks: losses and every gradient are those of the whole row on one rank."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import child_environment
from tests.models.untabled import gemma4_shared
from tests.warm import warm_ranks
from vlm_dist.config import Config
from vlm_dist.deepspeed_config import check_batches
from vlm_dist.errors import ConfigError
from vlm_dist.families import FAMILIES
from vlm_dist.models.sequence import SequenceCut
from vlm_dist.models.shared_pictures import share_rows
from vlm_dist.models.shared_rows import check_sequence
from vlm_dist.testing.builders import BUILDERS

CLOSE = 1e-5
FILMED = {name: bool(row.video) for name, row in FAMILIES.items()}


def compared(number: int, families: list[str], checkpoint, folder, dtype: str = "float32") -> dict[str, dict]:
    """Family -> case -> what tests/models/cut.py found on so many ranks."""
    out = folder / f"{number}.json"
    paths = [checkpoint(family) for family in families]
    ranks = warm_ranks(number, "tests/models/cut.py", out, dtype, *paths, environment=child_environment())
    outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    assert out.exists(), outputs[0][-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("number", "families"),
    [
        (2, ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"]),
        (2, ["llava_next", "llava_next_video", "llava_onevision", "mistral3", "qwen2_vl", "idefics3", "smolvlm"]),
        (2, ["glm4v", "glm4v_moe", "mini_vlm", "gemma4", "gemma4_moe", "qwen3_vl_moe"]),
        (4, ["qwen2_5_vl", "qwen3_vl"]),
    ],
)
def test_losses_and_gradients_are_those_of_whole_rows(number, families, checkpoint, tmp_path):
    """Pictures at the start, at a cut, several, none, videos; lengths that N does not divide; packed rows; with and without kernels
    and gradient checkpointing. On four ranks the two heads of keys and values of the tiny models are repeated."""
    found = compared(number, families, checkpoint, tmp_path)
    assert list(found) == families
    for family, cases in found.items():
        assert len(cases) == (14 if FILMED.get(family, True) else 12) and sum(case["padded"] > 0 for case in cases.values()) >= 2, family
        for name, case in cases.items():
            assert case["loss"] == pytest.approx(case["expected"], rel=CLOSE), (family, name)
            assert case["worst"] < CLOSE, (family, name, case["which"])
            assert case["again"] == pytest.approx(case["expected"], rel=CLOSE), (family, name)  # outside of training nothing is cut
            assert case["shared"] == (family != "mistral3")
            if name.startswith(("several", "packed", "videos")):  # one of the videos' batch is a lone picture
                most = (0.9 if name.startswith("videos") else 0.7) * case["pictures"]
                assert (case["mine"] < most) if case["shared"] else (case["mine"] == case["pictures"]), (family, name)


@pytest.mark.parametrize(
    ("family", "cached", "why"), [("mistral3", False, "Pixtral's"), ("llava", True, "data.cache_features"), ("llava", False, "")]
)
def test_pictures_that_are_not_shared_out_are_told(family, cached, why):
    _, model = BUILDERS[family]()
    told = share_rows(model, FAMILIES[family], SequenceCut(2, 0), cached=cached)
    assert bool(told) == bool(why) and why in told and told.startswith("engine.sequence_parallel: each rank" if why else "")


@pytest.mark.slow
def test_layers_with_embeddings_of_their_own(tmp_path):
    """Gemma 4's small sizes: each layer is given an embedding of the tokens, and late layers take keys and values of earlier ones. In
    float64: embeddings that are nearly nothing make float32's rounding large in their gradients."""
    torch.manual_seed(0)
    folder = tmp_path / "gemma4_shared"
    for part in gemma4_shared():
        part.save_pretrained(folder)
    cases = compared(2, ["gemma4_shared"], lambda name: f"{folder}", tmp_path, "float64")["gemma4_shared"]
    assert all(case["worst"] < CLOSE and case["loss"] == pytest.approx(case["expected"], rel=CLOSE) for case in cases.values()), cases


@pytest.mark.parametrize("family", ["mllama", "qwen3_5"])
def test_what_cannot_be_cut_is_refused_by_name(family):
    with pytest.raises(ConfigError, match=rf"engine\.sequence_parallel=2: rows of '{family}' cannot be cut"):
        check_sequence(FAMILIES[family], None, 2)
    check_sequence(FAMILIES[family], None, 1)


def test_heads_that_ranks_do_not_divide_are_refused(checkpoint):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint("llava"))
    check_sequence(FAMILIES["llava"], config, 4)
    with pytest.raises(ConfigError, match=r"engine\.sequence_parallel=3: does not divide the 4 attention heads of .*use 1, 2, 4"):
        check_sequence(FAMILIES["llava"], config, 3)


def test_ranks_are_groups(settings):
    def rounds(ranks: int) -> int:
        training = {"steps": 1, "global_batch": 4, "micro_batch": 1}
        return check_batches(Config.model_validate(settings | {"training": training, "engine": {"sequence_parallel": 2}}), ranks)

    assert rounds(2) == 4 and rounds(8) == 1
    with pytest.raises(ConfigError, match=r"engine\.sequence_parallel=2: 3 ranks"):
        rounds(3)
    with pytest.raises(ConfigError, match=r"micro_batch x ranks = 1 x 3 \(groups of 2, engine\.sequence_parallel\); use 3"):
        rounds(6)


def test_parts_of_a_row():
    row = torch.arange(12).view(2, 6)
    parts = [SequenceCut(3, part) for part in range(3)]
    assert torch.equal(parts[0].of(row, 1), row)
    for cut in parts:
        with cut.cutting():
            assert cut.of(row, 1).tolist() == [[2 * cut.part, 2 * cut.part + 1], [2 * cut.part + 6, 2 * cut.part + 7]]
