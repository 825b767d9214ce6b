"""What the documentation promises: the quickstart reaches its targets, and every `vlm-dist` command of the pages runs as written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vlm_dist.cli.config import reference
from vlm_dist.cli.main import main

PAGES = ["README.md", "docs/quickstart.md", "docs/data.md", "docs/training.md", "docs/models.md", "docs/scaling.md", "docs/security.md",
         "docs/memory.md", "docs/using.md", "docs/containers.md"]  # fmt: skip
COMMAND = re.compile(r"^(?:    |\$ |    \$ )(?:\.venv/bin/)?vlm-dist (.+?)(?:\s{2,}#.*)?$", re.M)
# Shown for a machine with a GPU and a network; run at tiny scale in test_train.py, test_pack.py and test_mini_vlm.py.
# The page of `chat` is opened in a browser in test_chat.py, a report is watched in test_report.py.
NOT_HERE = ("qwen2_5_vl_7b_qlora", "jxie/flickr8k", "mini_vlm_flickr8k", "--watch")
PAGES_THAT_SERVE = ("chat runs/quickstart",)
# Shown as mistakes, with their error.
WRONG_ON_PURPOSE = ("optim.lrr=1e-3",)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for line in COMMAND.findall((ROOT / page).read_text()):
            if line not in found and line not in PAGES_THAT_SERVE and not any(word in line for word in NOT_HERE):
                found.append(line)
    return found


def test_the_settings_page_is_made_from_the_code():
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), "vlm-dist config --markdown > docs/configuration.md"


def test_every_message_of_the_troubleshooting_page_exists():
    """The words stand in the code as they stand on the page."""
    files = [*(ROOT / "vlm_dist").rglob("*.py"), ROOT / "launch" / "slurm" / "train.sbatch"]
    code = "\n".join(path.read_text() for path in files)
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", code).split())
    for words in re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M):
        assert words in code, words


def scores(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["eval"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_quickstart_and_every_command_of_the_pages(tmp_path, monkeypatch, capsys):
    """The commands of scripts/quickstart.sh in an empty folder, at full size: captions >= 60 %, questions <= 25 % before and >= 80 %
    after; then all others of the pages."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    quickstart = re.findall(r"^\$vlm (.+?)(?: >/dev/null)?$", (ROOT / "scripts" / "quickstart.sh").read_text(), re.M)
    assert len(quickstart) == 4
    for line in quickstart:
        assert main(shlex.split(line)) == 0, line
    assert scores(Path("runs/quickstart-base"))["after"]["exact_match"] >= 0.6
    assert scores(Path("runs/quickstart"))["before"]["exact_match"] <= 0.25
    assert scores(Path("runs/quickstart"))["after"]["exact_match"] >= 0.8
    assert Path("runs/quickstart/report.html").stat().st_size > 10_000
    for line in commands():
        words = shlex.split(line.split(" | ")[0].split(" > ")[0])
        code = main(words)
        assert (code != 0) if any(word in line for word in WRONG_ON_PURPOSE) else (code == 0), line


def test_python_of_the_models_page(tmp_path, monkeypatch):
    from vlm_dist.testing import tiny_checkpoint

    monkeypatch.chdir(tmp_path)
    tiny_checkpoint("llava", "checkpoints/tiny-llava")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/models.md").read_text(), re.S)
    exec(code, {})
    assert (tmp_path / "out/adapter/vlm_dist.json").exists() and (tmp_path / "out/merged/model.safetensors").exists()


@pytest.mark.slow
def test_python_page(tmp_path, monkeypatch):
    """Its cells, one after another in one namespace, as in a notebook."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S):
        exec(code, names)
    assert names["summary"]["ended"] == "finished" and names["page"].exists()
    assert names["parts"].image_tokens == 17 and (tmp_path / "checkpoints" / "mini" / "mini_vlm.py").exists()
    assert (tmp_path / "lora_model" / "adapter_model.safetensors").exists() and (tmp_path / "merged" / "model.safetensors").exists()


def test_pages_name_files_that_exist():
    for page in [
        *PAGES,
        "docs/README.md",
        "docs/python.md",
        "docs/kernels.md",
        "docs/architecture.md",
        "docs/cli.md",
        "docs/api.md",
        "docs/benchmarks/README.md",
        "docs/log.md",
        "docs/recipes.md",
        "CONTRIBUTING.md",
    ]:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
        for name in re.findall(r"(?<![\w/.])(?:scripts|configs|launch|docs|tests)/[\w/.-]+\.(?:sh|py|yaml|md|json|png)\b", text):
            assert (ROOT / name).exists(), f"{page}: {name}"
