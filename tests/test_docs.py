"""The examples of the docstrings and of the README do what they say."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sdt_blocks
from sdt_blocks.models import registry

ROOT = Path(__file__).resolve().parents[1]
MODULES = [m.name for m in pkgutil.walk_packages(sdt_blocks.__path__, "sdt_blocks.")]
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ("mixing.md", "tutorials")  # which test_mixing.py and test_tutorials.py run
EXAMPLES = [
    found
    for page in PAGES
    if not {page.name, page.parent.name} & set(ELSEWHERE)
    for found in re.findall(
        r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", page.read_text(encoding="utf-8"), re.DOTALL
    )
]
# Around an example: where neurons run, all must fire at some time, or it shows zeros.
BEFORE = """
import torch, snntorch
from sdt_blocks.surrogate import transformed
fired = {}

def note(module, args, output):
    spikes = output[0] if isinstance(output, tuple) else output
    looked_at = torch.compiler.is_compiling() or transformed()  # traced values are no numbers
    if isinstance(module, snntorch.SpikingNeuron) and not spikes.is_meta and not looked_at:
        fired[module] = fired.get(module, False) or bool(spikes.any())

looking = torch.nn.modules.module.register_module_forward_hook(note)
"""
AFTER = """
looking.remove()
assert all(fired.values()), f'{[*fired.values()].count(False)} of {len(fired)} neurons never fired'
"""


def test_docstring_examples():
    torch.manual_seed(0)
    attempted = failed = 0
    names = {"torch": torch, **{name: getattr(sdt_blocks, name) for name in sdt_blocks.__all__}}
    for name in ["sdt_blocks", *MODULES]:
        module = importlib.import_module(name)
        result = doctest.testmod(module, extraglobs=names)
        attempted, failed = attempted + result.attempted, failed + result.failed
    assert failed == 0 and attempted >= 8


@pytest.mark.parametrize(("example", "shown"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_readme_and_docs(example, shown, tmp_path, released_file, as_printed):
    (tmp_path / "8_384.pth.tar").write_bytes(released_file.read_bytes())
    if "neurobench" in example:
        pytest.importorskip("neurobench")
    code = BEFORE + example + AFTER
    if "optimize_for_inference" in example:
        code += "print('\\f', end='')\n" + example  # a hook keeps a network from being rebuilt: without one, after it
    if "exact=True" in example or "export_to_nir" in example:
        code = example  # which refuse a network with hooks
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if shown:
        as_printed(shown, done.stdout.rpartition("\f")[2])


def test_links_lead_to_files():
    links = [
        (page, link)
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8")))
        if "://" not in link
    ]
    assert len(links) > 20 and [link for page, link in links if not (page.parent / link).exists()] == []


def test_tables_have_one_rule_and_rows_of_one_width():
    tables = [
        (page.name, re.sub(r"`[^`\n]*`", "", table).splitlines())
        for page in PAGES
        for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(tables) > 40
    for page, rows in tables:
        assert [i for i, row in enumerate(rows) if set(row) <= set("|-: ") and "-" in row] == [1], (page, rows[0])
        assert len({row.count("|") for row in rows}) == 1, (page, rows[0])


def test_every_page_is_on_the_site():
    listed = re.findall(r": ([\w./]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")} <= set(listed)
    assert listed[0] == "index.md" and len(listed) == len(set(listed))


def test_the_keywords_of_models_are_those_of_their_classes():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    shared, table = re.search(r"All have(.*?)\n\n(.*?)\n\n", page, re.DOTALL).groups()
    for name, options in ((name, family.options) for name, family in registry.families().items()):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert set(re.findall(r"`(\w+)`", shared + row)) == {name, *options}


def test_importing_the_kit_stays_light():
    code = (
        "import sys, sdt_blocks; "
        "print([m for m in ('matplotlib', 'timm', 'torchvision', 'accelerate', 'tonic', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_datasets_folder_does_not_shadow_the_package_of_that_name():
    code = "import importlib.util as u; s = u.find_spec('datasets'); print(s and s.origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and str(ROOT) not in done.stdout
