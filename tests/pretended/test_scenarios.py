"""Whatever uses a GPU runs on one that is not there, and gives the CPU's numbers; no place that asks for a GPU is left out."""

from __future__ import annotations

import json

import pytest

from scripts import cuda_branches
from tests.conftest import losses_of
from tests.pretended.scenarios import parse, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran():
    return cuda_branches.run_scenarios()


def test_every_place_that_asks_for_a_gpu_is_reached(ran):
    places = cuda_branches.reach(ran["lines"])
    missed = [f"{place.file}:{place.line} {place.source}" for place in places if not place.reached and not place.excuse]
    assert not missed and len(places) > 40
    needless = [place.source for place in places if place.reached and place.excuse and "fake tensors" not in place.excuse]
    assert not needless, "no longer to be excused"
    there = {(place.file, place.source) for place in places}
    excused = {(file, source) for file, reasons in cuda_branches.EXCUSED.items() for sources in reasons.values() for source in sources}
    assert excused <= there, "excused, and no longer there"


def test_a_new_place_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_branches, "ROOT", tmp_path)
    (tmp_path / "vlm_dist").mkdir()
    spelled = ["x.device.type == 'cuda'", "x.is_cuda", "torch.cuda.is_available()", "not torch.cuda.is_available()", "runs_kernel(x)"]
    lines = [f"    if {test}:\n        pass\n" for test in spelled]
    (tmp_path / "vlm_dist" / "new.py").write_text(
        f"def f(x):\n{''.join(lines)}    y = 1 if x.is_cuda else 2\n    torch.cuda.empty_cache()\n"
    )
    found = cuda_branches.all_places()
    assert [place.source for place in found] == [*spelled, "1 if x.is_cuda else 2", "torch.cuda.empty_cache()"]


def test_the_training_is_that_of_the_cpu(ran, tmp_path):
    from vlm_dist.training.train import train

    prepare(tmp_path)
    train(parse(tmp_path, "cpu"))
    assert ran["losses"] == losses_of(tmp_path / "runs" / "cpu")


def test_every_kernel_of_a_step_was_launched(ran):
    launched = set(ran["kernels"])
    assert {"rms_norm._forward_kernel", "layer_norm._forward_kernel", "swiglu._forward_kernel", "rope._kernel"} <= launched
    assert {"nf4_dequantize._kernel", "linear_cross_entropy._row_kernel"} <= launched, json.dumps(sorted(launched))
