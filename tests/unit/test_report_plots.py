"""Plots: the front, what each draws, what is left out, and SVG that is safe within a page."""

import itertools
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure as Drawing
from matplotlib.text import Text

from bridle.errors import UserError
from bridle.report import pareto, tables
from bridle.report.data import Curve, Figure, Figures, Main, Method, RegulariserRound, Report, Round
from bridle.report.html import write_report
from bridle.report.pareto import pareto_front, tradeoffs
from bridle.report.plots import (
    draw_plots,
    further_constraints,
    other_tradeoffs,
    reliability,
    tradeoff,
    training_curves,
    write_plots,
)
from bridle.report.reading import read_report
from bridle.report.style import method_style
from bridle.report.svg import PIXELS, svg
from report_folder import DESCRIPTIONS, make_folder, make_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return read_report(make_folder(tmp_path_factory.mktemp("comparison")))


def figure(value, half_width=0.02):
    return Figure(value, value - half_width, value + half_width, n=100)


def compared(points, held_out="novels"):
    """A report whose methods stand at the given (violation, perplexity)."""
    methods = {
        name: Method(figures=Figures(violation={"rude": {"non-rude": figure(x)}}, perplexity={held_out: figure(y)}))
        for name, (x, y) in points.items()
    }
    return Report("grumble", main=Main("rude", "non-rude", held_out), methods=methods)


def texts(drawing):
    """All text of a figure, by axes."""
    drawing.draw_without_rendering()
    return [[text.get_text() for text in ax.texts if text.get_text()] for ax in drawing.axes]


def test_pareto_front_of_known_points():
    points = [(0.2, 70.0), (0.1, 75.0), (0.05, 80.0), (0.1, 76.0), (0.3, 70.0), (0.05, 80.0)]
    assert pareto_front(points) == [2, 5, 1, 0]
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 1.0)]) == [0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_front_is_what_nothing_dominates(points):
    def dominates(a, b):
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    front = [points[i] for i in pareto_front(points)]
    assert sorted(front) == sorted(p for p in points if not any(dominates(other, p) for other in points))
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(front))


def test_the_main_held_out_set_comes_first(report):
    assert [one.utility.on for one in tradeoffs(report)] == ["novels", "letters", "mmlu"]
    later = replace(report, main=Main("rude", "non-rude", "letters"))
    assert [one.utility.on for one in tradeoffs(later)] == ["letters", "novels", "mmlu"]
    assert tradeoffs(replace(report, main=None)) == []


@pytest.mark.parametrize(
    ("tasks", "drawn"), [(["piqa", "mmlu", "commonsense"], ["mmlu", "commonsense"]), (["piqa"], ["piqa"])]
)
def test_single_tasks_are_left_out_beside_their_summary(tasks, drawn):
    figures = Figures(violation={"rude": {"non-rude": figure(0.1)}}, tasks={task: figure(0.5) for task in tasks})
    found = tradeoffs(Report("grumble", main=Main("rude", "non-rude"), methods={"sft": Method(figures=figures)}))
    assert [one.utility.on for one in found] == drawn
    assert all(one.more_is_better for one in found)


def test_of_accuracy_the_front_is_where_more_is(report):
    mmlu = tradeoffs(report)[2]
    assert mmlu.front == {"constrained-adaptive": (0.058, 0.271)}


def test_tradeoff_labels_every_measured_method_and_names_the_others(report):
    drawing, others = tradeoff(report), other_tradeoffs(report)
    (novels,), (letters, mmlu) = drawing.axes, others.axes
    assert "novels" in novels.get_ylabel()
    assert "letters" in letters.get_ylabel()
    assert "MMLU" in mmlu.get_ylabel()
    drawn = set(DESCRIPTIONS) - {"rl", "constrained"}
    assert set(texts(drawing)[0]) == {*drawn, "better"}
    assert "not measured: rl, constrained" in novels.get_xlabel()
    assert letters.get_xlabel().endswith("not measured: rl")


def test_two_policies_are_drawn_against_each_other(report):
    """The training oracle has its rates beside the main ones, and is not drawn."""
    rates = {"sft": (0.3, 0.32, 0.1), "rl": (0.1, 0.12, 0.5), "constrained-adaptive": (0.1, 0.11, 0.2)}
    measured = {
        name: Method(
            figures=Figures(
                violation={
                    "rude": dict(zip(("judge", "oracle", "brief"), map(figure, values), strict=True)),
                    "mild": {"brief": figure(0.4)},
                }
            )
        )
        for name, values in rates.items()
    }
    several = Report("grumble", main=Main("rude", "judge", None, "oracle"), methods=measured)
    (panel,) = pareto.further_constraints(several)
    assert panel.points == {name: (first, last) for name, (first, _, last) in rates.items()}
    assert list(panel.front) == ["constrained-adaptive", "sft"]
    (ax,) = further_constraints(several).axes
    assert ax.get_ylabel() == "violation rate on rude (brief, inverted)"
    assert ax.yaxis_inverted()
    assert further_constraints(report) is None, "one constraint"
    assert tradeoff(several) is None, "a rate is no utility"


def test_better_is_up_and_left_in_every_panel(report):
    (novels,), (_, mmlu) = tradeoff(report).axes, other_tradeoffs(report).axes
    assert novels.yaxis_inverted()
    assert not mmlu.yaxis_inverted()
    assert not novels.xaxis_inverted()


def test_the_front_goes_through_the_undominated_methods():
    ax = tradeoff(compared({"base": (0.2, 70.0), "sft": (0.1, 75.0), "rl": (0.15, 80.0)})).axes[0]
    (front,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(front.get_xydata(), [(0.1, 75.0), (0.2, 70.0)])


def test_the_values_of_a_knob_are_a_curve():
    points = {"base": (0.2, 70.0), "dpo@0.5": (0.1, 75.0), "dpo@0.05": (0.02, 90.0), "dpo@1e-05": (0.01, 95.0)}
    points |= {
        "constrained-adaptive": (0.05, 72.0),
        "constrained-adaptive@0.3": (0.1, 71.0),
        "constrained-adaptive@3": (0.04, 74.0),
    }
    points |= {"interleave@2": (0.1, 70.0), "interleave@10": (0.1, 71.0), "interleave@gap@2": (0.1, 69.0)}
    report = compared(points)
    (panel,) = tradeoffs(report)
    assert panel.sweeps == {
        "constrained-adaptive": ["constrained-adaptive@0.3", "constrained-adaptive", "constrained-adaptive@3"],
        "dpo": ["dpo@1e-05", "dpo@0.05", "dpo@0.5"],
        "interleave": ["interleave@2", "interleave@10"],
    }
    (ax,) = tradeoff(report).axes
    drawn = [line.get_xydata().tolist() for line in ax.lines if line.get_linestyle() == "-"]
    assert [list(points[name]) for name in panel.sweeps["dpo"]] in drawn
    labels = {text.get_text() for text in ax.texts}
    assert {"dpo@1e-05", "@0.05", "@0.5", "constrained-adaptive", "interleave@gap@2"} <= labels
    assert "dpo@0.5" not in labels
    styles = [method_style(name) for name in ("interleave@2", "interleave@10", "interleave@gap@2")]
    assert styles[0] == styles[1] != styles[2]


def test_intervals_reach_from_low_to_high():
    ax = tradeoff(compared({"base": (0.2, 70.0)})).axes[0]
    segments = [segment for bars in ax.collections for segment in bars.get_segments()]
    np.testing.assert_allclose(
        sorted(map(np.ndarray.tolist, segments)), [[[0.18, 70], [0.22, 70]], [[0.2, 69.98], [0.2, 70.02]]]
    )


def test_labels_cover_neither_each_other_nor_markers():
    places = {f"method-{i}": (0.1 + 0.001 * i, 70.0 + 0.02 * i) for i in range(4)} | {"far": (0.3, 90.0)}
    drawing = tradeoff(compared(places))
    drawing.draw_without_rendering()
    (ax,) = drawing.axes
    labels = [text for text in ax.texts if text.get_text() in places]
    boxes = [Text.get_window_extent(label) for label in labels]  # an annotation's own extent includes its line
    assert len(labels) == len(places)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box, place in itertools.product(boxes, places.values()):
        assert not box.contains(*ax.transData.transform(place))
        assert ax.bbox.x0 <= box.x0 < box.x1 <= ax.bbox.x1


@pytest.mark.parametrize("seed", range(5))
def test_a_dozen_labels_in_a_cluster_never_overlap(seed):
    points = 0.05 + 0.001 * np.random.default_rng(seed).random((12, 2)) * [1, 300]
    drawing = tradeoff(compared({f"constrained-{i:02}": (x, 70 + y) for i, (x, y) in enumerate(points)}))
    drawing.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in drawing.axes[0].texts if "constrained" in text.get_text()]
    assert len(boxes) == 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_training_curves_draw_every_run(report):
    compliance, kl, ce, weight = training_curves(report).axes
    assert compliance.get_ylabel() == "rollouts that comply"
    assert [len(ax.containers) for ax in (kl, weight)] == [8, 8]  # two domains, two seeds, two rounds
    assert len(ce.containers) == 8  # two methods, two seeds, two rounds
    segments = [segment for bars in compliance.collections for segment in bars.get_segments()]
    assert len(segments) == 4
    np.testing.assert_allclose(segments[0][:, 1], [0.76 - 0.026, 0.76 + 0.022])
    assert kl.get_yscale() == "log"
    assert weight.get_ylim()[0] == 0


def test_a_steered_run_shows_the_violation_beside_its_target():
    measured = [(1, 0.25, 8.0), (2, 0.12, 9.5)]
    steered = [
        Round(i, i, regularisers={"rude": RegulariserRound(violation=violation, weight=weight, target=0.1)})
        for i, violation, weight in measured
    ]
    report = Report("run", curves=[Curve("run", "0", steered)])
    weight, violation = training_curves(report).axes
    drawn = [line.get_ydata().tolist() for line in violation.get_lines()]
    assert (drawn[0], drawn[-1]) == ([0.25, 0.12], [0.1, 0.1])
    assert [text.get_text() for text in violation.texts] == ["target"]
    assert weight.get_ylabel() == "weight λ"
    (rude,) = tables.rounds(report)
    assert [cell.text for cell in rude.rows["2"]][5:7] == ["9.5", "10.0"]


def test_characters_that_no_font_has_are_named_once(tmp_path, caplog, recwarn):
    folder = make_folder(tmp_path / "comparison")
    results = folder / "results.json"
    results.write_text(results.read_text("utf-8").replace('"novels"', '"tablets 𒀀𒀁"'), encoding="utf-8")
    write_report(folder)
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    (said,) = [record.getMessage() for record in caplog.records if record.name == "bridle.report.style"]
    assert said == "plots: no installed font has 𒀀𒀁; the page shows them, PNG and PDF have boxes"


def test_a_target_looks_like_no_regulariser_and_is_labelled_once():
    names = [f"domain {number}" for number in range(5)]
    figures = {name: RegulariserRound(violation=0.2, weight=4.0, target=0.1) for name in names}
    report = Report("run", curves=[Curve("run", "0", [Round(i, i, regularisers=figures) for i in (1, 2)])])
    weight, violation = training_curves(report).axes
    of_regularisers = [line.get_linestyle() for line in weight.get_lines() if len(line.get_xdata()) == 2]
    assert len(of_regularisers) == 5
    assert ":" not in of_regularisers
    assert [line.get_linestyle() for line in violation.get_lines()].count(":") == 5
    assert [text.get_text() for text in violation.texts] == ["target"]


def test_a_kl_of_zero_is_not_drawn_on_a_log_scale():
    rounds = [Round(i, i, regularisers={"rude": RegulariserRound(kl=kl)}) for i, kl in ((1, 0.5), (2, 0.0))]
    (ax,) = training_curves(Report("run", curves=[Curve("run", "0", rounds)])).axes
    assert ax.get_yscale() == "linear"


def test_reliability_sizes_markers_by_count(report):
    first, second = reliability(report).axes
    assert (first.get_title(), second.get_title()) == ("round 1", "round 2")
    seed0, seed1 = first.collections
    np.testing.assert_allclose(seed0.get_offsets()[-1], (0.95, 0.96))
    assert np.all(np.diff(seed0.get_sizes()) > 0)
    assert len(seed1.get_offsets()) == 5
    assert "ECE 0.054, 0.060" in first.get_legend().get_texts()[0].get_text()
    diagonal = first.lines[0].get_xydata()
    np.testing.assert_allclose(diagonal, [(0, 0), (1, 1)])


def test_of_many_rounds_the_first_and_the_last_are_among_the_drawn():
    bins = RegulariserRound(r_reliability=[(0.5, 0.5, 10)], r_ece=0.0)
    rounds = [Round(number, number, regularisers={"rude": bins}) for number in range(1, 21)]
    axes = reliability(Report("run", curves=[Curve("run", "0", rounds)])).axes
    assert len(axes) == 6
    assert (axes[0].get_title(), axes[-1].get_title()) == ("round 1", "round 20")


def test_nothing_to_draw_is_none():
    empty = Report("nothing")
    assert tradeoff(empty) is other_tradeoffs(empty) is training_curves(empty) is reliability(empty) is None


def test_files_of_a_training_run(tmp_path):
    folder = tmp_path / "plots"
    write_plots(draw_plots(read_report(make_run(tmp_path / "run"))), folder)
    formats = itertools.product(("training_curves", "reliability"), ("png", "svg", "pdf"))
    assert {path.name for path in folder.iterdir()} == {f"{name}.{suffix}" for name, suffix in formats}
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(folder / "reliability.svg").getroot().tag == f"{SVG}svg"
    assert (folder / "reliability.pdf").read_bytes().startswith(b"%PDF")


def test_files_are_the_same_bytes_again(report, tmp_path):
    small = replace(compared({"base": (0.2, 70.0), "sft": (0.1, 75.0)}), curves=report.curves[-1:])
    for name in ("first", "again"):
        write_plots(draw_plots(small), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert {name.partition(".")[0] for name in files} == {"tradeoff", "training_curves", "reliability"}
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "plots").write_text("a file", encoding="utf-8")
    with pytest.raises(UserError, match=r"tradeoff\.png: cannot be written"):
        write_plots({"tradeoff": Drawing()}, tmp_path / "plots")


def test_svg_is_one_accessible_element_without_references_outside(report):
    text = svg(tradeoff(report), "Trade-off <1>", "Violation & perplexity")
    root = ElementTree.fromstring(text)
    assert text.startswith("<svg ")
    assert (root.get("role"), root.get("height")) == ("img", None)
    assert root.get("viewBox").startswith("0 0 ")
    assert float(root.get("width")) == round(PIXELS * float(root.get("viewBox").split()[2]))
    by_id = {element.get("id"): element for element in root.iter() if element.get("id")}
    assert by_id[root.get("aria-labelledby")].text == "Trade-off <1>"
    assert by_id[root.get("aria-describedby")].text == "Violation & perplexity"
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    references = re.findall(r'href="([^"]*)"|url\(([^)]*)\)', text)
    assert references
    assert all(("".join(pair))[0] == "#" and "".join(pair)[1:] in by_id for pair in references)
    assert "<style" not in text
    assert " style=" not in text


def test_svg_takes_its_ink_from_the_page(report):
    text = svg(training_curves(report), "Curves", "By round")
    assert "currentColor" in text
    assert not re.search(r"#1b1b1f|#ffffff|#000000", text)


def test_svg_is_repeatable_and_two_in_a_page_share_no_id(report):
    one, other = svg(reliability(report), "One", ""), svg(training_curves(report), "Other", "")
    assert one == svg(reliability(report), "One", "")
    ids = re.findall(r'id="([^"]*)"', one + other)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a $x^2$ b", "a & b", "bell\x07", "line\nbreak", "_hidden"]
)
def test_a_name_is_only_ever_text(name):
    text = svg(tradeoff(compared({name: (0.1, 70.0), "base": (0.2, 71.0)}, held_out=name)), name, name)
    root = ElementTree.fromstring(text)
    visible = name.replace("\x07", " ").replace("\n", " ")
    assert visible in [element.text for element in root.iter(f"{SVG}text")]
    assert f"perplexity of {visible} (inverted)" in [element.text for element in root.iter(f"{SVG}text")]
    assert not list(root.iter(f"{SVG}script"))
    assert root.find(f"{SVG}title").text == visible


def test_names_that_need_the_legend_are_only_ever_text(report):
    named = replace(report, curves=[replace(curve, method=f"_<b>$x$ {curve.method}") for curve in report.curves])
    for draw in (training_curves, reliability):
        assert "_&lt;b&gt;$x$ constrained-adaptive" in svg(draw(named), "", "")


def test_styles_do_not_rest_on_colour_alone():
    names = [*DESCRIPTIONS, "rl-converged", "nado-decoding", "nado-decoding-sft"]
    styles = [method_style(name) for name in names]
    assert len({(style.marker, style.filled) for style in styles}) == len(names)
    assert method_style("my-method") == method_style("my-method")


@pytest.mark.parametrize(
    "name", [*DESCRIPTIONS, "nado-decoding", "sft-kl", "l2-sp", "lora-small", "wise-ft", "interleave"]
)
def test_colours_stand_out_on_light_and_on_dark(name):
    def luminance(color):
        channels = np.array(to_rgb(color))
        return np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    light, color, dark = map(luminance, ("#ffffff", method_style(name).color, "#16161a"))
    assert (light + 0.05) / (color + 0.05) >= 3  # what WCAG asks of graphics
    assert (color + 0.05) / (dark + 0.05) >= 3


def test_a_drawing_of_ones_own_can_be_inlined():
    drawing = Drawing()
    drawing.add_subplot().plot([0, 1], [0, 1], marker="o")
    assert ElementTree.fromstring(svg(drawing, "Line", "A line")).tag == f"{SVG}svg"
