"""report.html: self-contained, complete, and right in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import browser, errors_of
from vlm_dist.cli.main import main
from vlm_dist.errors import ConfigError, MachineError
from vlm_dist.reporting.compare import write_comparison
from vlm_dist.reporting.report import write_report
from vlm_dist.reporting.watch import serve_report


@pytest.fixture
def run(tmp_path) -> Path:
    """The files of a run, as `train` writes them."""
    run = tmp_path / "runs" / "demo"
    (run / "samples" / "thumbnails").mkdir(parents=True)
    (run / "config.yaml").write_text("name: demo\n")
    rows = []
    for step in range(1, 41):
        numbers = {"loss": 5 / step, "lr": 1e-3, "grad_norm": 1.0, "samples": 8 * step, "tokens": 100 * step, "label_tokens": 10 * step}
        speed = {"tokens_per_s": 50.0, "step_s": 2.0, "data_wait_s": 0.1, "padding_fraction": 0.1, "peak_memory_bytes": 2**30}
        more = {"imbalance": {"tokens": 0.01, "patches": 0.05}, "loss_by_dataset": {"a": 2.0, "b": None if step % 2 else 1.0}}
        rows.append({"step": step, **numbers, **speed, **more, **({"loss": None, "grad_norm": None} if step == 7 else {})})
    for phase, step, share in (("before", 0, 0.0), ("during", 20, 0.5), ("after", 40, 1.0)):
        rows.append(
            {
                "step": step,
                "phase": phase,
                "eval": {"exact_match": share, "token_f1": share / 4, "samples": 2, "by_kind": {"colour": share}},
            }
        )
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"ended": "finished", "step": 40, "result": "adapter", "wall_s": 80.0, "goodput": 0.87}))
    events = [{"time": 1e9, "step": step, "event": "checkpoint", "text": f"step-{step:08d}"} for step in (10, 40)]
    events.insert(0, {"time": 1e9, "step": 7, "event": "skipped", "text": "the loss is nan; no update. Samples: <b>k7</b>"})
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for phase, answers in (("before", ["blue", "?"]), ("after", ["red", "<script>alert(1)</script>"])):
        lines = []
        for number, answer in enumerate(answers):
            name = f"thumbnails/{number:05d}.png"
            Image.new("RGB", (64, 64), ("red", "green")[number]).save(run / "samples" / name)
            truth = ("red", "green")[number]
            row = {"key": f"k{number}", "task": "qa", "kind": "colour", "prompt": "What colour?", "answer": answer, "truth": truth}
            lines.append(json.dumps({**row, "exact": answer == truth, "thumbnail": name}) + "\n")
        (run / "samples" / f"{phase}.jsonl").write_text("".join(lines))
    (run / "quarantine.jsonl").write_text(json.dumps({"shard": "s.tar", "key": "bad", "reason": "cannot be decoded"}) + "\n")
    return run


def test_page_is_self_contained_and_escaped(run):
    page = write_report(run).read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)(?!#)", page)
    assert "<script>alert(1)</script>" not in page and "&lt;script&gt;" in page
    assert page.count("<svg") == 12 and page.count("data:image/png;base64,") == 2
    assert "step-00000040" in page and "step-00000010" not in page and "&lt;b&gt;k7" in page and "87%" in page
    for words in ("0.0 % before", "<b>100.0 %</b>", "cannot be decoded", "finished", "demo", "<th>token_f1</th>", "<td>0.250</td>"):
        assert words in page


def test_the_headline_is_what_the_run_goes_by(run):
    """checkpoint.best_metric, with a curve of its own; exact match beside it; and what is right without the pictures."""
    (run / "config.yaml").write_text("name: demo\ncheckpoint: {best_metric: token_f1}\n")
    page = write_report(run).read_text()
    assert "Held-out token_f1: 0.000 before, <b>0.250</b>" in page and "exact match 0.0 % before, 100.0 % after" in page
    assert "<h3>Held-out token_f1</h3>" in page and "greyed out" not in page
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    blind = {
        "samples": 2,
        "exact_match": 0.5,
        "token_f1": 0.125,
        "with_pictures": {"exact_match": 1.0, "token_f1": 0.25},
        "needs_eyes": 0.5,
    }
    rows[-1]["eval"]["without_pictures"] = blind
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    assert "greyed out: 0.125 (with them 0.250; 2 questions have one). Right with the picture alone: <b>50.0 %</b>" in page
    assert "<th>without_pictures</th>" not in page


def test_earlier_turns_and_how_many_answers(run):
    """A conversation's question is read with what was said before; how many of the answers are shown is said."""
    path = run / "samples" / "after.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    row["earlier"] = [{"role": "user", "text": "Is it <old>?"}, {"role": "assistant", "text": "yes"}]
    row["without_picture"] = {"answer": "green", "exact": False}
    path.write_text("".join(json.dumps({**row, "key": f"k{number}", "number": number}) + "\n" for number in range(60)))
    page = write_report(run).read_text()
    assert "The first 48 of 60 answers" in page and page.count("2 earlier turns") == 48 and "Is it &lt;old&gt;?" in page
    assert page.count('<dt>blind</dt><dd class="wrong">green</dd>') == 48


def test_scores_of_other_questions_are_marked(run, other):
    """Two runs whose held-out questions differ."""
    assert "Not of the same" not in write_comparison([run, other], run.parent / "compared.html").read_text()
    path = other / "samples" / "after.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + json.dumps({**json.loads(lines[1]), "key": "another"}) + "\n")
    page = write_comparison([run, other], run.parent / "compared.html").read_text()
    assert "Not of the same held-out questions:</b> 2, 2 questions, of which 1 are the same." in page


def test_watching_a_run_that_goes_on(run, tmp_path):
    """The page is made anew for each visit, and asks to be loaded again; before the first step it says so."""
    with serve_report(run, host="127.0.0.1", port=0, every=7) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        before = urllib.request.urlopen(address, timeout=30).read().decode()
        assert '<meta http-equiv="refresh" content="7">' in before and "step-00000041" not in before
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1e9, "step": 41, "event": "checkpoint", "text": "step-00000041"}) + "\n")
        assert "step-00000041" in urllib.request.urlopen(address, timeout=30).read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "../config.yaml", timeout=30)
        metrics = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text("")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(address, timeout=30)
        with pytest.raises(MachineError, match="give another --port"):
            serve_report(run, host="127.0.0.1", port=server.server_port, every=7)
        server.shutdown()
    (run / "metrics.jsonl").write_text(metrics)
    assert "http-equiv" not in write_report(run).read_text()


@pytest.fixture
def other(run) -> Path:
    """A second run beside it, with another learning rate and a mixture."""
    settings = {"model": {"name": "m"}, "training": {"steps": 40}}
    mixture = {"a": {"shards": ["a.tar"]}, "b": {"shards": ["b.tar"]}}
    other = shutil.copytree(run, run.parent / "other")
    for path, lr, train in ((run, 1e-3, ["a.tar"]), (other, 2e-3, mixture)):
        config = {"name": path.name, **settings, "data": {"train": train}, "optim": {"lr": lr}}
        (path / "config.yaml").write_text(json.dumps(config))
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] <= 20 or "eval" in row]
    for row in rows:
        if "eval" in row:
            row["eval"]["exact_match"] /= 2
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return other


def test_runs_compared(run, other, capsys):
    assert main(["report", str(run), str(other)]) == 0
    page = (run.parent / "compared.html").read_text()
    assert capsys.readouterr().out.strip() == str(run.parent / "compared.html")
    assert not re.search(r"(?:src|href)=\"(?!data:)(?!#)", page) and page.count("<svg") == 6 and page.count("var(--curve-2)") > 5
    assert "<td>optim.lr</td><td>0.001</td><td>0.002</td>" in page and "data.train.b.shards" in page and "<td>model.name</td>" not in page
    assert "<td>exact match</td><td>100.0 %</td><td>50.0 %</td>" in page and "<td>steps</td><td>40</td><td>20</td>" in page
    same = write_comparison([run, shutil.copytree(run, run.parent / "more" / "demo")], run.parent / "same.html").read_text()
    assert "Nothing but their names." in same and "more/demo" in same


def test_runs_that_cannot_be_compared(run, tmp_path, capsys):
    assert main(["report", str(run), str(tmp_path / "nowhere")]) == 2
    assert "nowhere: no run with at least one step" in capsys.readouterr().err
    assert main(["report", *[str(run)] * 7]) == 2
    assert "at most 6" in capsys.readouterr().err
    assert main(["report", "--watch", str(run), str(run)]) == 2


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, True), (390, False)])
def test_a_comparison_in_a_browser(run, other, width, dark):
    page = write_comparison([run, other], run.parent / "compared.html")
    with browser(width, dark=dark) as driver:
        driver.get(page.as_uri())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width and errors_of(driver) == []
        colours = driver.execute_script("return [...document.querySelectorAll('p .key')].map(k => getComputedStyle(k).backgroundColor)")
        assert len(set(colours)) == 2
        line = "return getComputedStyle([...document.querySelectorAll('svg path')].find(p => p.style.stroke.includes('curve-2'))).stroke"
        assert driver.execute_script(line) == colours[1]


@pytest.mark.browser
def test_answers_are_chosen_by_their_outcome(run):
    page = write_report(run)
    shown = "return [...document.querySelectorAll('.answer')].filter(a => !a.hidden).map(a => a.querySelector('dl').innerText)"
    with browser() as driver:
        driver.get(page.as_uri())
        counts = driver.execute_script("return [...document.querySelectorAll('.filter button')].map(b => b.innerText)")
        assert counts == ["all 2", "learnt 1", "lost 0", "wrong after 1", "right after 1"]
        driver.execute_script("document.querySelector('[data-show=wrong]').click()")
        assert len(driver.execute_script(shown)) == 1 and "alert" in driver.execute_script(shown)[0]
        assert errors_of(driver) == []


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no run with at least one step"):
        write_report(tmp_path)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (390, False)])
def test_in_a_browser(run, width, dark):
    """The page opens from file://, its pictures load, nothing overflows the window, and no error is logged."""
    page = write_report(run)
    with browser(width, dark=dark) as driver:
        driver.get(page.as_uri())
        assert driver.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return document.querySelectorAll('.answer').length") == 2
        ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground)[:3])) < 80) == dark
        assert errors_of(driver) == []
