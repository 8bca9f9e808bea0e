"""The commands that pages show and nothing runs: their scripts, configurations and keys are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import sdt
from common.config import all_keys, load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINE = re.compile(r"(?:^|[|;]|&&) *`?((?:sdt|python|accelerate launch|srun) [^`|#\n]*)", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of each command that is shown, from the recipe's name on."""
    found = []
    for line in LINE.findall(text.replace("\\\n", " ")):
        words = [re.sub(r"^\[|(?<=\w)[,;]$", "", word) for word in shlex.split(line)]
        words = [word if "[" in word else word.rstrip("]") for word in words]
        recipes = [i for i, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word)]
        if words[0] == "sdt":
            named = [word for word in words if word in sdt.TRAINING]
            at = words.index(named[0]) if words[1] == "train" and named else 1
            found.append(words[at:])
        elif recipes:
            found.append([Path(words[recipes[-1]]).stem, *words[recipes[-1] + 1 :]])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_tells_to_type_is_there(page):
    configs = {path.stem for path in (RECIPES / "configs").glob("*.yaml")}
    for name, *words in commands(page.read_text(encoding="utf-8")):
        shown = f"{page.name}: {name} {' '.join(words)}"
        assert name in (*sdt.TRAINING, *sdt.OTHERS, "launch", "train", "configs"), shown
        settings = [word for word in words if re.fullmatch(r"[\w.]+=\S+", word) and not word.startswith("seeds=")]
        for word in settings:
            key, _, value = word.partition("=")
            assert key != "config" or value in configs or value.isupper() or value.endswith(".yaml"), shown
            assert "." not in key or key in all_keys() or key.startswith(("model.", "neuron.")), shown
        if name in sdt.TRAINING:
            default = re.search(r'(?:main\(|DEFAULT = )"(\w+)"', (RECIPES / f"{name}.py").read_text(encoding="utf-8"))
            load_config([word for word in settings if not word.endswith(("NAME", "=FILE.yaml"))], default=default[1])


def test_pages_show_commands():
    shown = {str(page.relative_to(ROOT)): len(commands(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert shown["README.md"] >= 6 and shown["recipes/README.md"] >= 30 and shown["docs/families.md"] >= 10, shown
