"""The examples of docs/analysis.md run, and its pictures are there and small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "analysis.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["kit", "neurobench"])
def test_examples(example, tmp_path):
    if "neurobench" in example:
        pytest.importorskip("neurobench")
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_pictures():
    pictures = [DOCS / name for name in re.findall(r"!\[.*?\]\((.*?)\)", TEXT)]
    assert pictures and all(picture.is_file() for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) < 300_000
