"""The documentation as a site: it builds without a warning, needs no network, and its made pages are those that the code makes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import networkx as nx
import pytest

import vlm_dist
import vlm_kernels
from scripts import benchmarks_page, cli_page, draw_architecture, gpu_page, testing_page
from tests.browser import browser
from tests.conftest import ROOT, child_environment
from vlm_dist.cli.main import build_parser
from vlm_dist.cli.parsers import parse

DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("made", "page", "script"),
    [
        (cli_page.page, "cli.md", "cli_page.py"),
        (benchmarks_page.page, "benchmarks/README.md", "benchmarks_page.py"),
        (draw_architecture.draw, "architecture.svg", "draw_architecture.py"),
        (testing_page.page, "testing.md", "testing_page.py"),
        (lambda: gpu_page.page(gpu_page.PAGE.read_text(encoding="utf-8")), "gpu.md", "gpu_page.py"),
    ],
)
def test_made_pages_are_those_that_the_code_makes(made, page, script):
    assert (DOCS / page).read_text(encoding="utf-8") == made(), f"python scripts/{script}, or scripts/docs.sh for all of them"


def test_every_example_of_the_commands_page_is_understood():
    examples = re.findall(r"^    vlm-dist (.+)$", (DOCS / "cli.md").read_text(), re.M)
    assert len(examples) >= len(list(cli_page.leaves(build_parser())))
    for line in examples:
        assert callable(parse(build_parser(), shlex.split(line)).run), line


def test_every_raw_result_is_on_the_benchmarks_page_and_every_command_fits_its_script():
    page = (DOCS / "benchmarks" / "README.md").read_text()
    for path in (DOCS / "benchmarks").glob("*.json"):
        assert re.search(rf"^\| \[{path.name}\]\({path.name}\) \| \S.+ \|", page, re.M), (
            f"{path.name}: say in scripts/benchmarks_page.py what it shows"
        )
        assert f"# {path.name}" in page, f"{path.name} does not say which command made it"
    for command in re.findall(r"^    (\S.*?)  +#", page, re.M):
        words = shlex.split(command)
        if "-m" in words:
            script = (ROOT / "kernels" / words[words.index("-m") + 1].replace(".", "/")).with_suffix(".py")
        else:
            script = ROOT / next(word for word in words if word.startswith("scripts/"))
        text = script.read_text()
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in text, f"{script} knows no {option}"


def test_the_api_page_has_all_that_is_public():
    page = (DOCS / "api.md").read_text()
    names = re.findall(r"^::: (vlm_\w+)\.(\w+)$", page, re.M)
    other_names = {"UnslothVisionDataCollator"}
    assert {name for module, name in names if module == "vlm_dist"} == set(vlm_dist.__all__) - other_names
    assert {name for module, name in names if module == "vlm_kernels"} == set(vlm_kernels.__all__)
    for name in vlm_kernels.__all__:
        text = getattr(vlm_kernels, name).__doc__
        assert "Args:" in text and "Returns:" in text and "[" in text, f"{name}: shapes, arguments and result belong into its docstring"


def test_every_arrow_of_the_drawing_points_down_and_none_is_missing():
    space = "{http://www.w3.org/2000/svg}"
    groups = ET.parse(DOCS / "architecture.svg").getroot().findall(f"{space}g")
    boxes = {group.get("data-room"): group.find(f"{space}rect") for group in groups if group.get("data-room")}
    spans = {room: (float(box.get("y")), float(box.get("y")) + float(box.get("height"))) for room, box in boxes.items()}
    arrows = nx.DiGraph((group.get("data-from"), group.get("data-to")) for group in groups if group.get("data-from"))
    arrows.add_nodes_from(boxes)
    for start, end in arrows.edges:
        assert spans[start][1] < spans[end][0], f"{start} -> {end} does not point down"
    for room in draw_architecture.find_rooms().values():
        assert nx.descendants(arrows, room.name) >= room.imports, f"imports of {room.name} are not in the drawing"
        assert room.name in boxes


class Links(HTMLParser):
    """What a page loads, where it leads, and the places in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.leads, self.places = [], [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places |= {found.get("id"), found.get("name")}
        if tag == "a" and found.get("href"):
            self.leads.append(found["href"])
        elif found.get("src") or (tag == "link" and found.get("href")):
            self.loads.append(found.get("src") or found["href"])


def local(page: Path, addresses: list[str]) -> Iterator[tuple[Path, str]]:
    for address in addresses:
        parts = urlsplit(address)
        if not parts.scheme:
            yield (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve(), unquote(parts.fragment)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    environment = {**child_environment(), "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    return out


def test_the_site_builds_strict_and_needs_no_network(site):
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) == len([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])
    assert not [page for page in pages if "mermaid.esm" in page.read_text(encoding="utf-8")]
    for page, links in pages.items():
        assert not [address for address in links.loads if urlsplit(address).scheme in ("http", "https") or address.startswith("//")], page
        for target, place in local(page, links.loads + links.leads):
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.name} names {target}"
            assert not place or target not in pages or place in pages[target].places, f"{page.name}: no #{place} in {target.name}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert "load_in_4bit" in (site / "api.html").read_text(encoding="utf-8")


@pytest.mark.browser
def test_pages_fit_a_phone(site):
    with browser(390) as driver:
        for name in ("index", "architecture", "models", "kernels", "configuration", "api", "benchmarks/index"):
            driver.get((site / f"{name}.html").as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 390, name
            pictures = driver.execute_script("return [...document.images].filter(image => !image.naturalWidth).map(image => image.src)")
            assert not pictures
