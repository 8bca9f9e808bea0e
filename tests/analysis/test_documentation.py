"""The pictures of docs/analysis.md are there and small."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "analysis.md").read_text(encoding="utf-8")


def test_pictures():
    pictures = [DOCS / name for name in re.findall(r"!\[.*?\]\((.*?)\)", TEXT)]
    assert pictures and all(picture.is_file() for picture in pictures)
    assert sum(picture.stat().st_size for picture in pictures) < 300_000
