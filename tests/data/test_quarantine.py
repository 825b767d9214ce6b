"""One file names the unusable samples of a run, each once, whichever rank met it."""

from __future__ import annotations

import json
import threading

from vlm_dist.data.quarantine import Quarantine


def sample(key: str) -> dict:
    return {"__url__": "a.tar", "__key__": key}


def keys(path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_a_sample_that_two_ranks_meet_is_named_once(tmp_path):
    """Lanes are drawn anew in every epoch: what one rank found broken in the first, the other finds in the second."""
    path = tmp_path / "runs" / "quarantine.jsonl"
    first, second = Quarantine(path, 0.1), Quarantine(path, 0.1)
    first.add(sample("x"), "damaged")
    second.add(sample("x"), "damaged")
    second.add(sample("y"), "damaged")
    first.add(sample("y"), "damaged")
    assert keys(path) == ["x", "y"] and len(first) == len(second) == len(Quarantine(path, 0.1)) == 2
    assert first.num_bad == second.num_bad == 2


def test_a_line_that_is_being_written_is_read_when_it_is_there(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine, line = Quarantine(path, 0.1), json.dumps({"shard": "a.tar", "key": "x", "reason": "damaged"})
    path.write_text(line[:9])
    assert len(quarantine) == 0
    path.write_text(line + "\n")
    quarantine.note(sample("x"), "damaged")
    assert keys(path) == ["x"] and len(quarantine) == 1


def test_several_at_once(tmp_path):
    path = tmp_path / "quarantine.jsonl"

    def meet() -> None:
        quarantine = Quarantine(path, 1.0)
        for number in range(60):
            quarantine.note(sample(str(number)), "damaged")

    threads = [threading.Thread(target=meet) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(keys(path), key=int) == [str(number) for number in range(60)]


def test_a_line_that_a_kill_has_cut_off_takes_no_other_with_it(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"shard": "a.tar", "ke')
    quarantine = Quarantine(path, 0.1)
    quarantine.note(sample("x"), "damaged")
    assert json.loads(path.read_text().splitlines()[1])["key"] == "x" and len(Quarantine(path, 0.1)) == 1


def test_a_file_that_was_begun_anew(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.1)
    for key in "xy":
        quarantine.note(sample(key), "damaged")
    path.unlink()
    Quarantine(path, 0.1).note(sample("z"), "damaged")
    assert len(quarantine) == 3
