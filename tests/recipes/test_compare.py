"""Several runs side by side: the figures of each, whatever they are called and however far they are."""

from __future__ import annotations

import csv
import json

import pytest
from common.config import ConfigError
from PIL import Image


def write_run(folder, epochs, *, finished=True, energy=None, top1=(30.0, 20.0)):
    folder.mkdir(parents=True)
    lines = [
        {"epoch": e, "step": 8 * e, "lr": 0.1 / e, "train_loss": 2 / e, "test_loss": 3 / e, "test_top1": top1[e % 2],
         "firing_rate": 0.01 * e, "seconds": 10.0 * e}
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"model": "sdt_2_256", "data": "digits", "test_top1": lines[-1]["test_top1"], "best_top1": max(top1),
                   "epochs": epochs, "params": 1234567, "seconds": 10.0 * epochs}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
    if energy is not None:
        (folder / "analysis").mkdir()
        (folder / "analysis" / "energy.json").write_text(json.dumps({"total_mj": energy}))


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """`compare.py` in this process: what it prints."""
    import compare as recipe

    monkeypatch.chdir(tmp_path)

    def go(*arguments):
        recipe.main(arguments)
        return capsys.readouterr().out

    return go


def test_energy_of_other_weights_and_a_summary_of_fewer_steps_do_not_count(compare, tmp_path, capsys):
    from common.analyzed import note_analyzed

    write_run(tmp_path / "run", 3, energy=0.125)
    weights, summary = tmp_path / "run" / "best" / "model.safetensors", tmp_path / "run" / "summary.json"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    note_analyzed(tmp_path / "run" / "analysis", weights)
    assert "| 0.125 |" in compare("run")
    weights.write_bytes(b"two")
    import compare as recipe

    recipe.main(["run"])
    shown = capsys.readouterr()
    assert "0.125" not in shown.out and "analysis is of weights that the run has no more" in shown.err
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"steps": 16, "test_top1": 99.0}))
    assert "| run (not finished) | sdt_2_256 | digits | 3 | 20.00 | 30.00 | 1,234,567 |" in compare("run")


def test_the_table_has_each_runs_figures_in_three_formats(compare, tmp_path):
    write_run(tmp_path / "a" / "_x$y$", 3, energy=0.125)
    write_run(tmp_path / "b|50%", 2, finished=False)
    out = compare("a/_x$y$", "b|50%", "output_dir=out")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == [
        "run", "model", "data", "epochs", "top-1 (%)", "best top-1 (%)", "parameters", "energy (mJ)", "firing rate",
        "time (s)",
    ]  # fmt: skip
    assert table[2] == "| _x$y$ | sdt_2_256 | digits | 3 | 20.00 | 30.00 | 1,234,567 | 0.125 | 0.0300 | 30 |"
    assert table[3] == r"| b\|50% (not finished) | – | – | 2 | 30.00 | 30.00 | – | – | 0.0200 | 20 |"
    assert (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8").splitlines() == table
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["energy_mj"] for row in rows] == ["0.125", ""] and rows[0]["params"] == "1234567"
    tex = (tmp_path / "out" / "comparison.tex").read_text(encoding="utf-8")
    assert r"\_x\$y\$ & sdt\_2\_256 & digits & 3 & 20.00" in tex and r"b|50\% (not finished) & -- & --" in tex
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_runs_of_one_name_are_told_apart_by_their_folders(compare, tmp_path):
    for place in ("one", "two"):
        write_run(tmp_path / place / "digits", 1)
    out = compare("one/digits", "two/digits/")
    assert "| one/digits |" in out and "| two/digits |" in out
    assert "recipes/analyze.py" in out, "no energy has been computed: how to is said"


def test_what_is_no_run_is_refused(compare, tmp_path):
    write_run(tmp_path / "run", 1)
    write_run(tmp_path / "odd", 1)
    (tmp_path / "odd" / "summary.json").write_text('{"params": "many"}')
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((), "name the run folders"),
        (("nowhere",), "nowhere: no such folder"),
        (("run", "empty"), "empty is no run folder"),
        (("run", "run"), "a run is named twice"),
        (("run", "odd"), "params should be a number, found 'many'"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(*arguments)
    assert not (tmp_path / "comparison").exists()


def test_curves_lie_over_whole_epochs(tmp_path, monkeypatch):
    from common import pictures

    write_run(tmp_path / "run", 3)
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append((figure, path)))
    pictures.draw_curves(tmp_path / "run")
    ((figure, path),) = drawn
    assert path == tmp_path / "run" / "curves.png"
    panels = {axes.get_ylabel(): axes for axes in figure.axes}
    assert panels.keys() == {"loss", "top-1 (%)", "learning rate", "firing rate"}
    assert panels["firing rate"].lines[0].get_ydata() == pytest.approx([0.01, 0.02, 0.03])
    assert panels["learning rate"].lines[0].get_ydata() == pytest.approx([0.1, 0.05, 0.1 / 3])
    for axes in panels.values():
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
