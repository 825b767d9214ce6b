"""Which card a rank gets, and what is said where CUDA does not start: the driver's files are real files, of another folder."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from tests.conftest import run_command, write_config
from tests.warm import warm_ranks
from vlm_dist import cards
from vlm_dist.errors import MachineError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA starts here")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver and a card that CUDA cannot start on, which is so where no such card is."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n")
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr(cards, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(cards, "DEVICES", tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@no_gpu
def test_a_card_that_cuda_does_not_start_on(driver, monkeypatch, settings, tmp_path):
    from vlm_dist import load_config, train

    with pytest.raises(
        MachineError, match=r"NVIDIA driver 470.57.02 is here, but (CUDA .* does not start|torch .* for the CPU alone).*device=cpu"
    ):
        train(load_config(write_config(settings, tmp_path)))
    assert not (tmp_path / "runs").exists()
    assert cards.choose_device(0, "cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cards.choose_device(0).type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (driver / "nvidia0").unlink()  # a container without a card
    assert cards.choose_device(0).type == "cpu"


@no_gpu
def test_the_driver_of_windows(tmp_path, monkeypatch):
    """Under WSL, which has no file of a driver and no device of its name."""
    monkeypatch.setattr(cards, "DRIVER", tmp_path / "version")
    assert cards.choose_device(0).type == "cpu"
    (tmp_path / "libcuda.so.1").touch()
    monkeypatch.setattr(cards, "OF_WINDOWS", tmp_path / "libcuda.so.1")
    with pytest.raises(MachineError, match=r"Windows' NVIDIA driver is here, but CUDA .* does not start"):
        cards.choose_device(0)


@no_gpu
def test_whatever_takes_a_card_says_the_same(driver):
    with pytest.raises(MachineError, match=r"470\.57\.02"):
        cards.device_here()
    assert cards.device_here("cpu").type == "cpu"


@no_gpu
def test_the_doctor_says_the_same(driver):
    from vlm_dist.checking.doctor import _gpus

    (check,) = _gpus()
    assert check.state == "bad" and "470.57.02" in check.found


WAYS = {
    "all of four": [("a", "0123")] * 4,
    "each its own (srun --gpus-per-task=1)": [("a", "0"), ("a", "1"), ("a", "2"), ("a", "3")],
    "--gpu-bind=closest, ranks in blocks": [("a", "01"), ("a", "01"), ("a", "23"), ("a", "23")],
    "--gpu-bind=closest, ranks dealt out": [("a", "01"), ("a", "23"), ("a", "01"), ("a", "23")],
    "the same, on two nodes": [("a", "01"), ("b", "01"), ("a", "01"), ("b", "01")],
    "more cards than ranks": [("a", "0123")] * 2,
    "alone": [("a", "0123")],
}


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_has_a_card_of_its_own(way):
    """Ranks that agree in a store, each told its node and the cards that it sees."""
    store, taken, local = torch.distributed.HashStore(), {}, {}

    def rank(number: int, node: str, seen: str, local_rank: int) -> None:
        place = cards.agreed_card(store, len(WAYS[way]), number, node, local_rank, seen)
        assert place is not None
        taken[number] = (node, seen[place])

    threads = []
    for number, (node, seen) in enumerate(WAYS[way]):
        threads.append(threading.Thread(target=rank, args=(number, node, seen, local.setdefault(node, 0))))
        local[node] += 1
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(taken.values())) == len(taken) == len(WAYS[way])
    cards.check_cards([taken[number] for number in range(len(taken))])


def test_too_few_cards_are_told():
    cards.check_cards([("a", ""), ("a", "")])
    cards.check_cards([("a", "x"), ("a", "y"), ("b", "x")])
    with pytest.raises(MachineError, match=r"ranks 0 and 2 share one GPU of a \(x\)"):
        cards.check_cards([("a", "x"), ("b", "x"), ("a", "x")])
    with pytest.raises(MachineError, match="rank 1 on b has no GPU"):
        cards.check_cards([("a", "x"), ("b", "")])


@pytest.mark.parametrize("other", ["", "x"])
def test_a_rank_without_a_card(other):
    """Beside one that has none either, and beside one that has one, which then says so too."""
    store = torch.distributed.HashStore()
    store.append("cards of b" if other else "no cards", f'[1, "b", 0, "{other}"]\n')
    store.add("cards told", 1)
    if other:
        with pytest.raises(MachineError, match="rank 0 on a has no GPU, other ranks have one"):
            cards.agreed_card(store, 2, 0, "a", 0, [])
    else:
        assert cards.agreed_card(store, 2, 0, "a", 0, []) is None


def test_blocks_of_the_allocator_grow_unless_the_user_said_otherwise(monkeypatch):
    for name in cards.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    cards.choose_device(0, "cpu")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    cards.choose_device(0, "cpu")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_one_rank_of_a_node_fetches_before_the_others(tmp_path):
    """The other finds what it fetched; and where it fails, the other is not left waiting."""
    from tests.conftest import child_environment

    ranks = warm_ranks(2, "tests/launch/fetching.py", str(tmp_path), environment=child_environment())
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
    assert (tmp_path / "found").read_text() == "fetched" and (tmp_path / "failed-1").exists()


def test_a_rank_that_is_gone_is_not_waited_for():
    """Though it went before the others began to wait, and the wait has no end."""
    from tests.conftest import child_environment

    first, second = warm_ranks(2, "tests/launch/gone.py", environment=child_environment())
    output, _ = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert "the other is gone" in output, output


@no_gpu
def test_one_line_at_the_command(settings, tmp_path):
    result = run_command("train", str(write_config(settings, tmp_path)), "engine.device=gpu")
    assert result.returncode == 2 and "engine.device" in result.stderr
