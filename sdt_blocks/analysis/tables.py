"""Tables of figures as Markdown, as LaTeX for a paper, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]

ABSENT = "–"

_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
_LATEX |= {ABSENT: "--", "µ": r"\textmu{}", "±": r"$\pm$", "\n": " "}


LOW, HIGH = "_low", "_high"
"""Suffixes of a column's key: the ends of the interval around its value, which are columns of their own in CSV."""


class Column(NamedTuple):
    """One column: the key of its values, its heading, and the format of its numbers; None if it holds text."""

    key: str
    heading: str
    format: str | None = None

    def shown(self, row: Row) -> str:
        """A cell of the printed tables; a deviation (key with `_std`) or an interval follows its mean."""
        value, deviation = row.get(self.key), row.get(f"{self.key}_std")
        if value is None or self.format is None:
            return ABSENT if value is None else str(value)
        text = format(value, self.format)
        ends = [row.get(f"{self.key}{end}") for end in (LOW, HIGH)]
        if None not in ends:
            text += f" [{', '.join(format(end, self.format) for end in ends)}]"
        return text if deviation is None else f"{text} ± {format(deviation, self.format)}"


def counted(number: int, one: str) -> str:
    """A number of things, "1 step" or "4 steps": `one` is the word for one of them, whose plural ends in s."""
    return f"{number} {one}{'' if number == 1 else 's'}"


def as_files(rows: Sequence[Row], columns: Sequence[Column], note: str = "") -> dict[str, str]:
    """The table as CSV, Markdown and LaTeX, by the ending of its file."""
    return {"csv": as_csv(rows, columns), "md": markdown(rows, columns, note), "tex": latex(rows, columns, note)}


def write(texts: Mapping[str, str], stem: Path) -> None:
    """Writes texts as `stem` with their endings; the folder is created if it is missing."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending, text in texts.items():
        stem.with_name(f"{stem.name}.{ending}").write_text(text, encoding="utf-8", errors="backslashreplace")


def markdown(rows: Sequence[Row], columns: Sequence[Column], note: str = "") -> str:
    """The rows as a Markdown table, with numbers aligned to the right, and the note below."""
    cells = [[column.shown(row).replace("|", "\\|").replace("\n", " ") for column in columns] for row in rows]
    sides = ["---" if column.format is None else "---:" for column in columns]
    lines = [[column.heading for column in columns], sides, *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return f"{table}\n{note}\n" if note else table


def latex(rows: Sequence[Row], columns: Sequence[Column], note: str = "") -> str:
    """The rows as a LaTeX tabular with booktabs' rules, with the note as a comment above it."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in cells) + r" \\"

    sides = "".join("l" if column.format is None else "r" for column in columns)
    head, body = line([column.heading for column in columns]), [line([c.shown(row) for c in columns]) for row in rows]
    begin = [rf"\begin{{tabular}}{{{sides}}}", r"\toprule", head, r"\midrule"]
    comment = [f"% {part}" for part in note.splitlines()]
    return "\n".join([*comment, *begin, *body, r"\bottomrule", r"\end{tabular}", ""])


def as_csv(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The rows as CSV under their keys, with numbers in full precision."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    ends = [(column.key, f"{column.key}{LOW}", f"{column.key}{HIGH}") for column in columns]
    keys = [key for of in ends for key in of if key == of[0] or any(row.get(key) is not None for row in rows)]
    table.writerow(keys)
    table.writerows([csv_cell(row.get(key)) for key in keys] for row in rows)
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """A value as a cell of a CSV file; text that a spreadsheet would compute as a formula is quoted."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
