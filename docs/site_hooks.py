"""What the site adds to MkDocs: pages from texts that stand elsewhere in the repository, and their links.

The repository's own web pages and the site show the same files. A link is written for the repository; here it is turned
into the one of the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

TEXTS = {
    "README.md": "index.md",
    "recipes/README.md": "recipes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""Texts outside of docs/, and their pages."""

PACKAGES: dict[str, str] = {
    "sdt_blocks": "",
    "sdt_blocks.blocks": "",
    "sdt_blocks.neuron": "",
    "sdt_blocks.models": "",
    "sdt_blocks.inference": "",
    "sdt_blocks.analysis": "",
    "sdt_blocks.steps": "",
    "sdt_blocks.surrogate": "",
    "sdt_datasets": "images image_sources image_transforms events event_data event_sources recordings",
}
"""Packages with a page each, and their modules where the package itself has no names."""

HIDDEN = {"sdt_blocks.inference": ("sdt_blocks.inference.trace.plan",)}
"""Names that a module of the package hides from whoever reads the sources alone."""

_LINK = re.compile(r"(?P<before>!?\[(?P<text>[^\]]*)\]\()(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


_installed = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads where the packages are
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Has datasets/ found under the name that it is installed as."""
    shutil.copytree(ROOT / "datasets", Path(_installed.name, "sdt_datasets"), dirs_exist_ok=True)
    paths = config.plugins["mkdocstrings"].config.handlers["python"]["paths"]
    if _installed.name not in paths:
        paths.append(_installed.name)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here."""
    for source, page in TEXTS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for package, modules in PACKAGES.items():
        files.append(File.generated(config, f"api/{package}.md", content=_reference(package, modules.split())))
    for source in sorted({one for page in files.documentation_pages() for one in _pictures(page)}):
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links into the repository turned into links of the site; what is on no page keeps its text."""
    source = _source(page.file)
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # it would list that one page

    def link(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        if "://" in path or path.startswith("mailto:"):
            return found[0]
        target = _in_repository(source, path)
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {path}, which is no file of the repository")
        shown = TEXTS.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(shown) is None:
            return f"`{target}`" if found["text"] == target else f"{found['text']} (`{target}`)"
        return f"{found['before']}{posixpath.relpath(shown, posixpath.dirname(page.file.src_uri))}{anchor})"

    return markdown if source.startswith("api/") else _outside_code(markdown, lambda text: _LINK.sub(link, text))


def _reference(package: str, modules: list[str]) -> str:
    """A page of the reference: the names that a package exports, or those of its modules."""
    if not modules:
        more = [f"::: {name}\n    options:\n      show_root_heading: true\n" for name in HIDDEN.get(package, ())]
        return "\n".join([f"# {package}\n", f"::: {package}\n", *more])
    parts = [f"## {package}.{name}\n\n::: {package}.{name}\n    options:\n      heading_level: 3\n" for name in modules]
    return "\n".join([f"# {package}\n", *parts])


def _source(file: File) -> str:
    """The file of the repository that a page shows."""
    texts = {page: source for source, page in TEXTS.items()}
    if file.src_uri in texts or file.src_uri.startswith("api/"):
        return texts.get(file.src_uri, file.src_uri)
    return f"docs/{file.src_uri}"


def _in_repository(source: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path))


def _pictures(page: File) -> list[str]:
    """Pictures outside of docs/ that a page shows or links to."""
    source = _source(page)
    linked = [_in_repository(source, found["path"]) for found in _LINK.finditer(page.content_string)]
    return [path for path in linked if path.endswith((".png", ".svg")) and not path.startswith("docs/")]


def _outside_code(markdown: str, change: Any) -> str:
    """The text with everything changed but its fenced code."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)


class Doctests(griffe.Extension):
    """Docstrings as Markdown, see `as_markdown`."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    """The docstring with a fence around every doctest, which ends at a blank line.

    Markdown would take `>>>` for a quotation, and so a line that happens to start with `>=`.
    """
    escaped = re.sub(r"^>(?!>> )", r"\\>", docstring, flags=re.MULTILINE)
    return re.sub(r"^>>> .*?(?=\n\s*\n|\Z)", r"```python\n\g<0>\n```", escaped, flags=re.DOTALL | re.MULTILINE)
