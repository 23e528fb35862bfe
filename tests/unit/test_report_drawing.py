"""The charts of the reports: where values land, worked out by hand from the margins of the plot, and what is drawn."""

import base64
import io
import itertools
import re

import pytest
from PIL import Image

from trainer.report.charts import BarChart, Beginning, Line, LineChart, LoadMap, Matrix, legend, thinned
from trainer.report.drawing import expert_load_png, png, svg
from trainer.report.page import percent_tick

# the plot lies between x 50 and 380 - 18 = 362 and, downwards, between y 14 and 250 - 40 = 210
GROUND, CEILING, START, END = 210.0, 14.0, 50.0, 362.0
MIDDLE_X, MIDDLE_Y = (START + END) / 2, (GROUND + CEILING) / 2


def chart(*lines, **more):
    return LineChart("a chart", lines, "x", "y", **more)


def paths(picture, style):
    """Corners of every path whose style holds the text."""
    drawn = re.findall(r'<path d="([^"]*)" style="([^"]*)"', picture)
    return [corners(path) for path, found in drawn if style in found]


def corners(path):
    numbers = re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)
    return [(float(x), float(y)) for x, y in numbers]


def texts(picture, anchor):
    """The texts of an axis: "middle" below the plot, "end" left of it."""
    return re.findall(rf"<text [^>]*text-anchor: {anchor}[^>]*>(.*?)</text>", picture)


def pixels(picture):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", picture)[1].replace("\n", ""))))


def test_points_land_where_their_values_say():
    picture = svg(chart(Line("a", [(0, 0), (5, 0.5), (10, 1.0)], 0)))
    assert paths(picture, "stroke: var(--s0)") == [[(START, GROUND), (MIDDLE_X, MIDDLE_Y), (END, CEILING)]]
    assert texts(picture, "middle") == ["0", "2", "4", "6", "8", "10", "x"]
    assert texts(picture, "end") == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]


def test_an_axis_that_need_not_start_at_zero():
    picture = svg(chart(Line("loss", [(1, 2.2), (2, 1.8)], 3), from_zero=False))
    assert texts(picture, "end") == ["1.8", "1.9", "2.0", "2.1", "2.2"]
    assert paths(picture, "stroke: var(--s3)") == [[(MIDDLE_X, CEILING), (END, GROUND)]]


def test_a_band_around_a_line():
    # 0.5 +- 0.25 at the left, 1.0 +- 0 at the right
    picture = svg(chart(Line("a", [(0, 0.5), (10, 1.0)], 2, spread=[0.25, 0.0]), form=percent_tick))
    assert "fill: var(--s2); fill-opacity: 0.15" in picture
    (band,) = re.findall(r'<path id="\w+" d="([^"]*)"', picture)  # its heights are counted from the foot of the picture
    assert {(x, y + 250) for x, y in corners(band)} == {
        (START, 63.0),
        (START, 161.0),
        (END, CEILING),
    }  # 14 + 196 * 1/4, 3/4
    assert texts(picture, "end") == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_levels_and_the_shaded_beginning():
    line, levels = Line("a", [(5, 0.2), (10, 0.4)], 0), [("teacher", 0.8), ("meta", 0.4)]
    drawn = chart(line, levels=levels, beginning=Beginning("preparation", 5, 4))
    picture = svg(drawn)
    heights = [[y for _, y in path] for path in paths(picture, "stroke-dasharray")]
    assert heights == [[CEILING, CEILING], [MIDDLE_Y, MIDDLE_Y]]
    (shade,) = paths(picture, "fill: var(--s4); opacity: 0.15")
    assert {x for x, _ in shade} == {START, MIDDLE_X} and {y for _, y in shade} == {GROUND, CEILING}
    assert legend(drawn) == [("a", "0"), ("teacher", "dash"), ("meta", "dot"), ("preparation", "pale 4")]


def test_ticks_read_differently():
    picture = svg(chart(Line("lr", [(0, 0), (1, 4e-4)], 0)))
    assert texts(picture, "end") == ["0", "1", "2", "3", "4"] and "1e−4</text>" in picture
    picture = svg(chart(Line("loss", [(0, 2.301), (1, 2.309)], 0), from_zero=False))
    assert texts(picture, "end") == ["2.300", "2.305", "2.310"]
    picture = svg(chart(Line("loss", [(0, 0), (40_000, 4321)], 0)))
    assert texts(picture, "end") == ["0", "1000", "2000", "3000", "4000", "5000"]
    assert texts(picture, "middle") == ["0", "10k", "20k", "30k", "40k", "x"]


def test_long_lines_are_averaged_and_single_points_shown():
    long = Line("a", [(i, 1.0 + (i % 2)) for i in range(1, 4801)], 0)
    assert thinned(long).points == [(i, 1.5) for i in range(20, 4801, 20)]  # of every 20 neighbours ten are 1, ten 2
    picture = svg(chart(long, Line("b", [(1, 1.0)], 1)))
    (line,) = paths(picture, "stroke: var(--s0)")
    assert len(line) <= 240 and len({y for _, y in line}) == 1
    assert picture.count("<use ") == 1


def test_flat_and_zero_lines_do_not_divide_by_zero():
    for values in ([(0, 0.0)], [(0, 0.0), (0, 0.0)], [(1, 5.0), (2, 5.0)], [(1, -3.0), (2, -3.0)]):
        picture = svg(chart(Line("a", values, 0), from_zero=False))
        assert "nan" not in picture and "inf" not in picture


def test_bars():
    groups = [("0", [0.5, 1.0]), ("1", [None, 0.25])]
    drawn = BarChart("bars", groups, [("t", 6), ("s", 0)], "module", "accuracy", percent_tick, [("teacher", 1.0)])
    picture = svg(drawn)
    heights = {kind: [sorted({y for _, y in bar}) for bar in paths(picture, f"fill: var(--s{kind})")] for kind in "60"}
    assert heights == {"6": [[MIDDLE_Y, GROUND]], "0": [[CEILING, GROUND], [161.0, GROUND]]}  # 210 - 196 / 4
    assert texts(picture, "middle") == ["0", "1", "module"]
    assert legend(drawn) == [("t", "6"), ("s", "0"), ("teacher", "dash")]


def test_heat_map_is_colourless_at_an_even_share():
    picture = svg(LoadMap("block 3", [(10, [1.0, 0.0, 2.0]), (20, [1.5, 1.0, 0.5])]))
    heat = pixels(picture)
    assert heat.size == (2, 3)
    orange, blue = (213, 94, 0), (0, 114, 178)
    assert heat.getpixel((0, 0))[3] == heat.getpixel((1, 1))[3] == 0
    assert heat.getpixel((0, 1)) == (*blue, 255) and heat.getpixel((0, 2)) == (*orange, 255)
    assert heat.getpixel((1, 0)) == (*orange, 128) and heat.getpixel((1, 2)) == (*blue, 128)
    assert texts(picture, "end") == ["0", "1", "2"]


@pytest.mark.parametrize("experts", [1, 4, 64, 300])
def test_heat_map_labels_do_not_overlap(experts):
    picture = svg(LoadMap("block 3", [(step, [1.0] * experts) for step in range(1, 1001)]))
    heights = [float(y) for y in re.findall(r'<text [^>]*text-anchor: end[^>]* y="([\d.]+)"', picture)]
    assert heights and all(b - a >= 13 for a, b in itertools.pairwise(heights))
    assert pixels(picture).size[0] <= 90


def test_matrix_rows_are_the_truth():
    picture = svg(Matrix("Confusion matrix", [[3, 1], [0, 2]], ["<a>", "b"]))
    cells = pixels(picture)
    orange, blue, grey = (213, 94, 0), (0, 114, 178), (128, 128, 128)
    # row a: 3 of 4 right, 1 of 4 taken for b; row b: nothing taken for a, all right
    assert [cells.getpixel((0, 0)), cells.getpixel((1, 0))] == [(*blue, 191), (*orange, 128)]
    assert [cells.getpixel((0, 1)), cells.getpixel((1, 1))] == [(*grey, 26), (*blue, 255)]
    assert re.findall(r">(\d)</text>", picture) == ["3", "1", "2"]
    assert texts(picture, "end") == ["&lt;a&gt;", "b"]


def test_labels_are_text_whatever_they_hold():
    for label in ("$x^", "a_b", "猫", "<svg>", "</text>", "#0072b2"):
        picture = svg(Matrix("Confusion matrix", [[3, 1], [0, 2]], [label, "b"]))
        assert label.replace("<", "&lt;").replace(">", "&gt;") in picture


def test_the_same_chart_gives_the_same_bytes():
    drawn = chart(Line("a", [(0, 0.5), (10, 1.0)], 0, marks=True), levels=[("teacher", 0.8)])
    assert svg(drawn) == svg(drawn) and png([drawn]) == png([drawn])
    loads = {"m2mKD": {"9": [(1, [1.0, 1.0]), (2, [1.5, 0.5])]}}
    assert expert_load_png(loads) == expert_load_png(loads)
    assert "<metadata" not in svg(drawn) and "<?xml" not in svg(drawn)


@pytest.mark.filterwarnings("error:constrained_layout not applied")
def test_long_labels_leave_room_for_the_plot():
    """Side by side in a legend they push a plot to nothing, of which matplotlib warns."""
    labels = [f"modules of whom a little more is told than there is room for, {letter}" for letter in "abcd"]
    assert png([chart(*(Line(label, [(0, 0.5), (10, 1.0)], 0) for label in labels))])


def test_colours_follow_the_page():
    picture = svg(chart(Line("a", [(0, 0.5), (10, 1.0)], 0, marks=True), levels=[("teacher", 0.8)]))
    assert not re.search(r"#[0-9a-f]{6}", picture)
