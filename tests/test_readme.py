"""The READMEs and docs/: every command parses, every link leads somewhere, in both languages."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CHINESE = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs/zh-CN").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md"]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks that call a script, without comments; continued lines are joined."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    blocks += re.findall(r"`(python \w+\.py[^`]*)`", page.read_text(encoding="utf-8"))
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", " ", block).split("\n")]
    return [
        shlex.join(shlex.split(line, comments=True)) for line in lines if "python " in line and ".py" in line
    ]


@pytest.mark.parametrize("page", PAGES + CHINESE + OTHERS, ids=name_of)
def test_every_command_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        for found in re.finditer(r"(?:^|[\s;&|])python (\w+)\.py([^;&|]*)", command):
            argv = shlex.split(found[2])
            if "..." not in found[2]:
                try:
                    load_script(found[1]).parse_args(argv)
                except SystemExit as end:
                    assert "--help" in argv and end.code == 0, f"{page.name}: {command}"
        for file in re.findall(r"(?:python|bash) ((?:benchmarks|tests)/\S+)", command):
            assert (ROOT / file).is_file(), f"{page.name}: {command}"


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=name_of)
def test_help_needs_no_installed_library(script):
    command = [sys.executable, "-I", "-S", script, "--help"]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


@pytest.mark.parametrize("page", PAGES + CHINESE + OTHERS, ids=name_of)
def test_links_lead_somewhere_and_pages_are_short(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("\n") <= (260 if page.name.startswith("README") else 150)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page.name}: {target}"
    for test in re.findall(r"tests/test_\w+\.py", text):
        assert (ROOT / test).is_file(), f"{page.name}: {test}"


def test_both_languages_have_the_same_pages_and_commands():
    names = [[page.name.replace(".zh-CN", "") for page in pages] for pages in (PAGES, CHINESE)]
    assert names[0] == names[1]
    for english, chinese in zip(PAGES, CHINESE, strict=True):
        scripts = [
            [re.findall(r"python (\w+\.py)", c) for c in commands(page)] for page in (english, chinese)
        ]
        assert scripts[0] == scripts[1], english.name
    first = [
        re.search(r"```\n(.*?)```", pages[0].read_text(encoding="utf-8"), re.S)[1]
        for pages in (PAGES, CHINESE)
    ]
    assert first[0] == first[1] and "requirements-dev.txt && pytest" in first[0]
