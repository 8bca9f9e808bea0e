"""The tables of a recipe: printed, and written with a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from sdt_blocks.analysis.tables import write
from sdt_blocks.files import written_together

from .config import RunError


def write_results(texts: Mapping[str, str], stem: Path, draw: Callable[[Path], None] | None = None) -> None:
    """Print a table and write its texts, and what `draw` draws, as `stem` with their endings. Raises `RunError`."""
    try:
        with written_together(stem.parent, last=f"{stem.name}.md") as drafts:
            write(texts, drafts / stem.name)
            if draw is not None:
                draw(drafts / f"{stem.name}.png")
    except OSError as error:
        raise RunError(f"output_dir={stem.parent} cannot be written ({error})") from error
    print(texts["md"])
    print(f"{stem.name}.md, .csv{' and .tex' if draw is None else ', .tex and .png'} are in {stem.parent}")
