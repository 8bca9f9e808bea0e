"""The tutorials run from top to bottom, as a reader would run them, and print what they show."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from sdt_blocks.models import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs/tutorials").glob("*.md"))}
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
HERE = {"train": ["threads=1", "tracker=none"], "evaluate": ["threads=1"], "analyze": ["threads=1"]}
"""What is added to a command, for cores that other tests share and for the time that a tracker takes to import."""

STILL_RUNNING = re.compile(r"^epoch \d+ \| .* left\n", re.MULTILINE)
"""What a run says every 30 s, which on a free machine is never."""


@pytest.fixture
def sdt(monkeypatch):
    """`sdt` in this process: what it is given is a line of a shell."""
    specification = importlib.util.spec_from_file_location("sdt_command", ROOT / "recipes/sdt.py")
    command = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(command)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["sdt"])
    monkeypatch.setattr(registry, "_FAMILIES", registry.families())
    threads = torch.get_num_threads()

    def run(line: str) -> None:
        program, *words = shlex.split(line)
        assert program == "sdt", line
        if "--num_processes" in words:  # a launcher's signals are its own
            subprocess.run([sys.executable, str(ROOT / "recipes/sdt.py"), *words, *HERE["train"]], check=True)
            return
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        command.main([*words, *HERE.get(words[0], [])])

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "page", [pytest.param(name, marks=pytest.mark.slow) if name == "clusters" else name for name in PAGES]
)
def test_a_tutorial_prints_what_it_shows(page, sdt, tmp_path, monkeypatch, capfd, as_printed):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    blocks = BLOCK.findall(PAGES[page])
    assert blocks and any(shown for *_, shown in blocks)
    names: dict = {}
    for number, (language, code, shown) in enumerate(blocks):
        capfd.readouterr()
        if language == "python":
            exec(compile(code, f"{page}, block {number + 1}", "exec"), names)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                sdt(line)
        if shown:
            as_printed(shown, STILL_RUNNING.sub("", capfd.readouterr().out))


def test_every_tutorial_says_what_to_read_next():
    assert len(PAGES) >= 6
    for page, text in PAGES.items():
        assert text.startswith("# ") and "\n## Read next\n" in text, page
