"""The benchmarks' machinery: gates, ratios, files, the README's table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_suites(monkeypatch: pytest.MonkeyPatch):
    """Suites import each other by file name, as when run.py starts them."""
    names = ("harness", "report", "run", "peers", "rates", "curves", "bench_sparse", "offline", "gpu_offline")
    names += ("machine", "sparse", "published")
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def the_same_networks_each_time() -> None:
    """Of random networks and images, a few are off their rates by more than others."""
    torch.manual_seed(0)


def test_a_wrong_answer_is_not_timed() -> None:
    import harness

    def wrong() -> str:
        raise harness.ParityError("off by one")

    bench, called = harness.Bench("s"), []
    contestants = {"floor": lambda: None, "bad": lambda: called.append(1)}
    samples = bench.race("f", "x", contestants, baseline="floor", parity={"bad": wrong}, rounds=3)
    assert list(samples) == ["floor"] and not called
    assert bench.failures == ["s: f, x: bad: off by one"]
    assert bench.rows[0]["parity"] == "FAILED: off by one" and "median" not in bench.rows[0]


def test_ratios_are_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness

    bench = harness.Bench("s")
    samples = {"floor": harness.Sample([1.0, 10.0, 2.0]), "a": harness.Sample([3.0, 30.0, 6.0])}
    monkeypatch.setattr(harness.Bench, "time", lambda *a, **o: samples)
    bench.race("f", "x", dict.fromkeys(samples, lambda: None), baseline="floor")
    assert [row["ratio"] for row in bench.rows] == ["1", "3"]
    assert [row["median"] for row in bench.rows] == ["2", "6"]


def test_parity_checks_can_fail() -> None:
    import harness

    spikes = torch.zeros(100)
    assert harness.same_spikes(spikes, spikes) == "equal"
    with pytest.raises(harness.ParityError, match=r"1\.00e-02 of the spikes differ"):
        harness.same_spikes(spikes.index_fill(0, torch.tensor(3), 1.0), spikes)
    with pytest.raises(harness.ParityError, match="shape"):
        harness.close(spikes[:3], spikes, 1.0)
    with pytest.raises(harness.ParityError, match="relative error nan"):
        harness.close(torch.tensor([float("nan")]), torch.ones(1), 1.0, most=1.0)
    tie = torch.ones(100).index_fill(0, torch.tensor(3), 0.5)
    assert (
        harness.close(tie, torch.ones(100), 0.1, most=0.01) == "relative error 0.0e+00, but for 1.0e-02 of the elements"
    )
    with pytest.raises(harness.ParityError, match=r"off: 1\.0e-02"):
        harness.close(tie, torch.ones(100), 0.1, most=0.009)


def test_rows_survive_the_file(tmp_path: Path) -> None:
    import harness

    bench = harness.Bench("s")
    bench.record("f", "x", "a", harness.Sample([1.0, 2.0, 3.0]), baseline="floor", ratio=2.0)
    harness.write_rows(bench.rows, tmp_path / "r.csv")
    (row,) = harness.read_rows(tmp_path / "r.csv")
    assert list(row) == harness.COLUMNS
    assert row["median"] == "2" and row["torch"] == torch.__version__ and row["machine"]


def test_every_suite_is_found() -> None:
    import run

    assert {"neuron", "block", "inference", "training", "scaling", "sparse", "networks", "gpu_offline"} <= set(
        run.find_suites()
    )
    assert not {"run", "report", "harness", "peers", "rates", "curves", "offline"} & set(run.find_suites())


ASSEMBLY = """
.text.kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/               @P2 BRA `(.L_x_2) ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_x_2:
        /*0060*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3) ;
$__internal_0_$__cuda_sm20_div_s64:
        /*0090*/                   RET.REL.NODEC R6 `(kernel) ;
"""


UNROLLED = """
        /*0000*/                   ULDC UR4, c[0x0][0x220] ;
        /*0010*/                   IMAD.U32 R5, RZ, RZ, UR4 ;
        /*0020*/                   IMAD.MOV.U32 R6, RZ, RZ, RZ ;
        /*0030*/                   ISETP.GT.U32.AND P0, PT, R5, 0x3, PT ;
        /*0040*/                   ISETP.GT.AND.EX P0, PT, R6, RZ, PT, P0 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0060*/              @!P3 LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0070*/                   IADD3 R5, P1, R5, -0x4, RZ ;
        /*0080*/                   IADD3.X R6, R6, -0x1, RZ, P1, !PT ;
        /*0090*/                   ISETP.GT.U32.AND P0, PT, R5, 0x3, PT ;
        /*00a0*/                   ISETP.GT.AND.EX P0, PT, R6, RZ, PT, P0 ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*00c0*/                   ISETP.NE.AND P0, PT, R5, RZ, PT ;
        /*00d0*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*00e0*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*00f0*/                   VIADD R5, R5, 0xffffffff ;
        /*0100*/                   UISETP.NE.AND UP0, UPT, UR9, URZ, UPT ;
        /*0110*/                   ISETP.NE.AND P0, PT, R5, RZ, PT ;
        /*0120*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0130*/                   PLOP3.LUT P4, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*0140*/               @P4 BRA `(.L_x_3) ;
        /*0150*/                   EXIT ;
"""


LEFT_BY_AN_EXIT = """
        /*0000*/                   UMOV UR5, URZ ;
.L_x_0:
        /*0010*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0020*/                   UIADD3 UR5, UR5, 0x1, URZ ;
        /*0030*/                   UISETP.NE.U32.AND UP0, UPT, UR5, 0xb, UPT ;
        /*0040*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
        /*0050*/              @P5 EXIT ;
        /*0060*/              @!P0 EXIT ;
        /*0070*/                   BRA `(.L_x_0) ;
"""


COUNTED_IN_64_BITS = """
        /*0000*/                   UMOV.64 UR4, URZ ;
        /*0010*/                   MOV.64 R14, RZ ;
.L_x_0:
        /*0020*/                   LDG.E R8, desc[UR6][R2.64] ;
        /*0030*/                   UIADD3.64 UR4, UPT, UPT, UR4, 0x1, URZ ;
        /*0040*/                   IADD.64 R14, R14, -0x1 ;
        /*0050*/                   UISETP.NE.U64.AND UP0, UPT, UR4, 0xb, UPT ;
        /*0060*/                   ISETP.GT.S64.AND P1, PT, RZ, R14, PT ;
        /*0070*/                   PLOP3.LUT P0, PT, P1, PT, UP0, 0x80, 0x8 ;
        /*0080*/              @!P0 EXIT ;
        /*0090*/                   BRA `(.L_x_0) ;
"""


PREDICATES_IN_REGISTERS = """
        /*0000*/                   ULDC UR4, c[0x0][0x220] ;
        /*0010*/                   UISETP.GE.AND UP1, UPT, UR4, 0x3, UPT ;
        /*0020*/                   IMAD.MOV.U32 R5, RZ, RZ, RZ ;
.L_x_0:
        /*0030*/                   PLOP3.LUT P1, PT, PT, PT, UP1, 0x40, 0x0 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   LDG.E R8, desc[UR6][R2.64] ;
.L_x_1:
        /*0060*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0070*/                   ISETP.NE.AND P0, PT, R5, UR4, PT ;
        /*0080*/                   P2R R9, PR, RZ, 0x1 ;
        /*0090*/                   P2R.B1 R11, PR, R9, 0x2 ;
        /*00a0*/                   FSETP.GE.AND P0, PT, R8, R10, PT ;
        /*00b0*/                   FSETP.GE.AND P1, PT, R8, R10, PT ;
        /*00c0*/                   P2R R10, PR, RZ, 0x2 ;
        /*00d0*/                   R2P PR, R11, 0x1 ;
        /*00e0*/               @P0 BRA `(.L_x_0) ;
        /*00f0*/                   R2P PR, R11.B1, 0x2 ;
        /*0100*/              @!P1 BRA `(.L_x_2) ;
        /*0110*/                   STG.E.U8 desc[UR6][R2.64], R8 ;
.L_x_2:
        /*0120*/                   LOP3.LUT P3, RZ, R11, 0x200, RZ, 0xc0, !PT ;
        /*0130*/              @!P3 BRA `(.L_x_3) ;
        /*0140*/                   STG.E.U16 desc[UR6][R2.64], R8 ;
.L_x_3:
        /*0150*/                   UP2UR UR8, UPR, URZ, 0x2 ;
        /*0160*/                   UISETP.NE.U32.AND UP0, UPT, UR8, URZ, UPT ;
        /*0170*/                   PLOP3.LUT P2, PT, P4, PT, UP0, 0x80, 0x8 ;
        /*0180*/              @!P2 BRA `(.L_x_4) ;
        /*0190*/                   STG.E desc[UR6][R2.64], R8 ;
.L_x_4:
        /*01a0*/                   ISETP.NE.AND P5, PT, R10, RZ, PT ;
        /*01b0*/               @P5 BRA `(.L_x_4) ;
        /*01c0*/                   EXIT ;
"""


def test_a_thread_is_followed_through_loops_and_round_slow_ways() -> None:
    offline = pytest.importorskip("offline")
    binary = offline.Binary(ASSEMBLY, capability=90, registers=32, spilled=0, shared=0, warps=4)
    counts = offline.machine.executed(ASSEMBLY, trips=3)
    assert counts["FADD"] == 3 and counts["STG.E.U8"] == 1 and "CALL.REL.NOINC" not in counts
    assert offline.accesses(counts) == {"L128": 1, "S8": 1}
    assert offline.kinds(counts)["float"] == 3
    h100 = offline.GPUS[90]
    assert offline.resident(binary, h100) == 16
    launch = offline.Launch(None, {}, (1000,))
    slow = offline.predict(launch, offline.Work(elements=1000, moved=8), binary, h100, counts)
    fast = offline.predict(launch, offline.Work(elements=1000, moved=1 << 30), binary, h100, counts)
    assert slow.share < 0.01 and fast.bound == "memory" and fast.share == 1
    assert slow.divisions == 1 and fast.seconds == pytest.approx((1 << 30) / h100.copy)
    offline.check(launch, offline.Work(elements=1000, moved=1000 * 128 * 17), binary, slow)
    with pytest.raises(RuntimeError, match="not gone round as often"):
        offline.check(launch, offline.Work(elements=1000, moved=1 << 30), binary, fast)


@pytest.mark.parametrize("number", [0, 3, 4, 27, 64])
def test_rounds_of_unrolled_loops_are_computed(number: int) -> None:
    """Four at a time and a rest, by counters of 64 bits; what nothing is known of is gone round as the caller says."""
    machine = pytest.importorskip("machine")
    counts = machine.executed(UNROLLED, trips=5, words={0x220: number, 0x224: 0})
    assert (counts["LDG.E.128"], counts["LDG.E"]) == divmod(number, 4)
    assert counts["PLOP3.LUT"] == 5


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_predicates_are_followed_into_registers_and_back(number: int) -> None:
    """As a kernel does with more of them than there are; and none is forgotten by what only reads it."""
    counts = pytest.importorskip("machine").executed(PREDICATES_IN_REGISTERS, trips=5, words={0x220: number})
    few = number < 3
    assert counts["IADD3"] == number and counts["LDG.E"] == (0 if few else number)
    # Each where the same predicate had come back, of a thread, as a bit of its register, and uniform.
    assert counts["STG.E.U8"] == counts["STG.E.U16"] == few
    # Nothing is known of P4, but both of them hold only if the other does.
    assert counts["STG.E"] == (not few)
    # What is unknown stays so.
    assert counts["ISETP.NE.AND"] == number + 5


def test_an_exit_is_taken_where_its_condition_is_known_to_hold() -> None:
    counts = pytest.importorskip("machine").executed(LEFT_BY_AN_EXIT, trips=5)
    assert counts["LDG.E"] == 11 and counts["EXIT"] == 22


def test_loops_are_counted_in_64_bits() -> None:
    counts = pytest.importorskip("machine").executed(COUNTED_IN_64_BITS, trips=5)
    assert counts["LDG.E"] == counts["EXIT"] == 11


def test_the_table_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    import harness
    import report

    bench = harness.Bench("s")
    bench.record("f", "x", "a", 2.0, baseline="floor", ratio=2.0)
    bench.record("g", "x", "a", 3.0, unit="GB")
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    rows = [{**dict.fromkeys(harness.COLUMNS, ""), **row} for row in bench.rows]
    report.rewrite(readme, report.table(rows))
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert "**f**, x (cpu), in brackets as a multiple of *floor*" in text and "| a | 2 s (2) |  |" in text
    assert "| g, x (cpu) | a | 3 GB |" in text
    assert "Not measured on a GPU yet." in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="needs the markers"):
        report.rewrite(readme, "table")


def test_the_front_page_sets_ours_beside_the_peer_by_the_same_run() -> None:
    import harness
    import report

    rows = []
    for suite, figure, ending, allocator, ours, peer in report.HEADLINES:
        for contestant, median in ((ours, "1"), (peer, "4")):
            row = dict.fromkeys(harness.COLUMNS, "")
            row |= {"suite": suite, "figure": figure, "device": "cpu", "allocator": allocator, "unit": "s"}
            rows.append(row | {"setting": f"a model, {ending}", "contestant": contestant, "median": median})
    lines = report.headlines(rows).splitlines()
    assert len([line for line in lines if line.endswith("| 0.25 |")]) == len(report.HEADLINES)
    with pytest.raises(KeyError):
        report.headlines(rows[:-1])


def test_figures_of_two_machines_are_in_two_tables() -> None:
    import harness
    import report

    row = dict.fromkeys(harness.COLUMNS, "") | {"figure": "f", "setting": "x", "baseline": "a", "ratio": "1"}
    rows = [row | {"contestant": "a", "median": "2", "unit": "s", "machine": name} for name in ("one", "two")]
    assert report.tables(rows).count("**f**, x") == 2 and report.table(rows).count("**f**, x") == 1


def test_plots_are_written(tmp_path: Path) -> None:
    import harness
    import report

    bench = harness.Bench("s")
    bench.record("f", "x", "a", 2.0, baseline="floor", ratio=2.0)
    bench.record("g", "x", "a", 2.0, unit="GB")
    (path,) = report.plot([{**dict.fromkeys(harness.COLUMNS, ""), **row} for row in bench.rows], tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_the_floor_counts_the_model_s_products() -> None:
    import peers

    images = torch.rand(2, 3, 32, 32)
    model = peers.firing_model("sdt_2_256", images, dim=32, depth=1)
    floor = peers.ConvolutionFloor(model, images)
    frames, tokens = 2 * 4, 8 * 8
    patch = 2 * 1024 * 27 * 4 + frames * 9 * (1024 * 4 * 8 + 1024 * 8 * 16 + 256 * 16 * 32 + tokens * 32 * 32)
    assert floor.multiply_adds == patch + frames * tokens * 12 * 32 * 32


@torch.no_grad()
def test_the_authors_arrangement_answers_as_the_model() -> None:
    pytest.importorskip("spikingjelly")
    import peers

    images = torch.rand(2, 3, 32, 32)
    model = peers.firing_model("sdt_2_256", images, dim=64, depth=1)
    model.patch.position.norm.bias += 1
    expected = model(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(peers.AuthorsArrangement(model).eval()(images), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_published_rates_reach_the_layers_that_they_were_measured_at() -> None:
    """Every product of a network of 8 blocks gets its input at the published rate, also behind the mask."""
    import csv

    import peers
    import published
    import rates

    from sdt_blocks.analysis import energy

    images = torch.rand(2, 3, 96, 96)
    model = peers.firing_model("sdt_8_512", images, dim=64, num_heads=1, num_classes=4)
    rates.set_rates(model, images, published.published_profile())
    with open(published.PUBLISHED, encoding="utf-8") as file:
        wanted = {row["layer"]: row["rates"] for row in csv.DictReader(file) if row["network"] == published.MEASURED}
    found = {layer.name: sum(layer.rate) / 4 for layer in energy(model, images, as_trained=True).layers}
    for layer, rate in wanted.items():
        room = 0.1 if ".proj." in layer else 0.02
        assert found[layer] == pytest.approx(float(rate), rel=room, abs=0.01), layer
    assert len(wanted) == 52


@torch.no_grad()
def test_every_layer_fires_at_its_rate() -> None:
    import peers
    import rates

    images = torch.rand(2, 3, 32, 32)
    model = peers.firing_model("sdt_2_256", images, dim=64, depth=2)
    wanted = {seat.name: 0.05 + 0.2 * (i % 3) for i, seat in enumerate(rates.seats(model))}
    rates.set_rates(model, images, wanted)
    assert rates.measured_rates(model, images) == pytest.approx(wanted, abs=0.02)


def test_break_even_lies_between_the_rates_where_the_ratio_passes_one() -> None:
    import run

    sparse = run.load_suite("sparse")
    ratios = [rate / 0.25 for rate in sparse.PRODUCT_RATES]
    assert sparse.break_even(ratios) == pytest.approx(0.25)
    assert sparse.break_even([0.5] * len(ratios)) == sparse.PRODUCT_RATES[-1]
    assert sparse.break_even([2.0] * len(ratios)) == 0


@torch.no_grad()
def test_work_is_counted_spike_by_spike() -> None:
    import harness
    import peers
    import run

    from sdt_blocks.inference import Events, plan
    from sdt_blocks.ops.packed import kernels_problem

    if kernels_problem():
        pytest.skip(str(kernels_problem()))
    sparse = run.load_suite("sparse")
    images = torch.rand(2, 3, 32, 32)
    model = peers.firing_model("sdt_2_256", images, dim=64, depth=1)
    fast, spikes = Events(plan(model)), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, _, name=name: spikes.update({name: (m, x[0])}))
    model(images)
    del spikes["patch.stages.0.conv"]
    additions = sum(x.sum().item() * m.weight.numel() / m.in_channels for m, x in spikes.values())
    # q, k and v read the same spikes.
    read_once = [x for name, (_, x) in spikes.items() if name[-6:] not in ("k.conv", "v.conv")]
    rate = sum(x.sum().item() for x in read_once) / sum(x.numel() for x in read_once)
    bench = harness.Bench("s")
    sparse.count_work(bench, fast, peers.ConvolutionFloor(model, images), images, "x")
    found = {row["contestant"]: float(row["median"]) for row in bench.rows if "median" in row}
    assert found["mean input rate"] == pytest.approx(rate, rel=1e-2)
    assert found["event-driven: additions"] == pytest.approx(additions / len(images) / 1e9, rel=1e-2)
    assert found["event-driven: multiply-adds (first layer)"] == pytest.approx(32 * 32 * 27 * 8 / 1e9)


def test_curves_are_drawn_over_measured_rates(tmp_path: Path) -> None:
    import curves
    import harness

    bench = harness.Bench("sparse")
    for rate, setting in ((0.1, "a, every layer at 12%"), (0.05, "a, every layer at 6%"), (0.2, "a, mixed")):
        bench.record("evaluation, batch 1", setting, "event-driven, fp32", rate * 10, unit="s")
        bench.record("work an image", setting, "mean input rate", rate, unit="share")
    line, others = curves.curves(bench.rows)["evaluation, batch 1"]["event-driven, fp32"]
    assert line == [(0.1, 1.0), (0.05, 0.5)] and others == [(0.2, 2.0)]
    assert curves.plot(bench.rows, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
