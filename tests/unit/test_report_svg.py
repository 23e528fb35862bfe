"""The charts of report.html: where values land, worked out by hand from the margins of the plot."""

import base64
import io
import itertools
import re

import pytest
from PIL import Image

from trainer.report.svg import Line, bar_chart, line_chart, load_map, matrix

# the plot lies between x 48 and 380 - 18 = 362 and, downwards, between y 10 and 250 - 40 = 210
GROUND, CEILING, START, END = 210.0, 10.0, 48.0, 362.0


def points(svg):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="(.*?)"', svg)
    ]


def texts(svg, kind):
    return re.findall(rf'<text [^>]*class="{kind}"[^>]*>(.*?)</text>', svg)


def test_points_land_where_their_values_say():
    svg = line_chart([Line("a", [(0, 0), (5, 0.5), (10, 1.0)], 0)], "epochs", "accuracy")
    assert points(svg) == [[(START, GROUND), ((START + END) / 2, 110.0), (END, CEILING)]]
    assert texts(svg, "x") == ["0", "2", "4", "6", "8", "10"]
    assert texts(svg, "y") == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert 'stroke="var(--s0)"' in svg


def test_an_axis_that_need_not_start_at_zero():
    svg = line_chart([Line("loss", [(1, 2.2), (2, 1.8)], 3)], "step", "loss", from_zero=False)
    assert texts(svg, "y") == ["1.8", "1.9", "2.0", "2.1", "2.2"]
    assert points(svg) == [[((START + END) / 2, CEILING), (END, GROUND)]]


def test_levels_and_the_shaded_beginning():
    line, levels = Line("a", [(5, 0.2), (10, 0.4)], 0), [("teacher", 0.8), ("meta", 0.4)]
    svg = line_chart([line], "cost", "accuracy", levels=levels, band=(5, 0))
    heights = re.findall(r'y1="([\d.]+)" y2="[\d.]+" class="level( dotted)?"><title>(\w+)', svg)
    assert heights == [("10.0", "", "teacher"), ("110.0", " dotted", "meta")]
    assert re.search(r'<rect x="48" y="10" width="157.0" height="200" class="band"', svg)


def test_ticks_read_differently():
    svg = line_chart([Line("lr", [(0, 0), (1, 4e-4)], 0)], "step", "lr")
    assert texts(svg, "y") == ["0", "1.0e-4", "2.0e-4", "3.0e-4", "4.0e-4"]
    svg = line_chart([Line("loss", [(0, 2.301), (1, 2.309)], 0)], "step", "loss", from_zero=False)
    assert texts(svg, "y") == ["2.300", "2.302", "2.304", "2.306", "2.308", "2.310"]
    svg = line_chart([Line("loss", [(0, 0), (1, 4321)], 0)], "step", "loss")
    assert texts(svg, "y") == ["0", "1000", "2000", "3000", "4000", "5000"]


def test_long_lines_are_averaged_and_single_points_shown():
    svg = line_chart([Line("a", [(i, 1.0 + (i % 2)) for i in range(1, 4801)], 0), Line("b", [(1, 1.0)], 1)], "x", "y")
    long, short = points(svg)
    assert len(long) == 240 and len({y for _, y in long}) == 1  # every 20 neighbours: ten of 1, ten of 2
    assert svg.count("<circle") == len(short) == 1


def test_flat_and_zero_lines_do_not_divide_by_zero():
    for values in ([(0, 0.0)], [(0, 0.0), (0, 0.0)], [(1, 5.0), (2, 5.0)], [(1, -3.0), (2, -3.0)]):
        svg = line_chart([Line("a", values, 0)], "x", "y", from_zero=False)
        assert "nan" not in svg and "inf" not in svg


def test_bars():
    svg = bar_chart([("0", [0.5, 1.0]), ("1", [None, 0.25])], [("t", 6), ("s", 0)], "module", "accuracy", str)
    bars = re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="var\(--s(\d)\)"><title>(.*?)</title>', svg)
    assert bars == [("110.0", "100.0", "6", "0, t: 0.5"), ("10.0", "200.0", "0", "0, s: 1.0"),
                    ("160.0", "50.0", "0", "1, s: 0.25")]  # fmt: skip


def test_heat_map_is_colourless_at_an_even_share():
    svg = load_map([(10, [1.0, 0.0, 2.0]), (20, [1.5, 1.0, 0.5])])
    heat = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])))
    assert heat.size == (2, 3)
    orange, blue = (213, 94, 0), (0, 114, 178)
    assert heat.getpixel((0, 0))[3] == heat.getpixel((1, 1))[3] == 0
    assert heat.getpixel((0, 1)) == (*blue, 255) and heat.getpixel((0, 2)) == (*orange, 255)
    assert heat.getpixel((1, 0)) == (*orange, 128) and heat.getpixel((1, 2)) == (*blue, 128)
    assert texts(svg, "y") == ["0", "1", "2"]


@pytest.mark.parametrize("experts", [1, 4, 64, 300])
def test_heat_map_labels_do_not_overlap(experts):
    svg = load_map([(step, [1.0] * experts) for step in range(1, 1001)])
    heights = [float(y) for y in re.findall(r'<text x="42" y="([\d.]+)" class="y">', svg)]
    assert all(b - a >= 13 for a, b in itertools.pairwise(heights))
    assert Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1]))).size[0] <= 90


def test_matrix_rows_are_the_truth():
    svg = matrix([[3, 1], [0, 2]], ["<a>", "b"])
    assert "<title>1 of 4 &lt;a&gt; taken for b</title>" in svg and "<title>2 of 2 b taken for b</title>" in svg
    assert re.findall(r'fill="(var\(--\w+\))" opacity="([\d.]+)"', svg) == [
        ("var(--right)", "0.75"), ("var(--wrong)", "0.50"), ("var(--right)", "1.00")]  # fmt: skip
    assert texts(svg, "x count") == ["3", "1", "2"]
