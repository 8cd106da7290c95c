"""Plots: labels that can be read, ids that do not collide, and the user's own matplotlib settings left alone."""

import re

import matplotlib as mpl
import pytest

from tersor.core.record import Record
from tersor.report.labels import Point, place_labels
from tersor.report.plots import accuracy_against_size, draw_all, latency, layers, losses
from tersor.report.schema import parse_summary
from tersor.report.svg import new_figure, settings


def texts(svg):
    return [re.sub(r"<[^>]+>", "", text) for text in re.findall(r"<text.*?</text>", svg, re.S)]


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.5])
def test_labels_of_crowded_points_do_not_cover_each_other_or_the_points(spread):
    with mpl.rc_context(settings()):
        figure = new_figure(300)
        axes = figure.subplots()
        axes.set(xlim=(0, 10), ylim=(80, 100))
        points = [Point(5, 90 + spread * n, 89 + spread * n, 91 + spread * n, f"step {n}") for n in range(4)]
        place_labels(axes, points)
        renderer = figure.canvas.get_renderer()
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
    frame = axes.get_window_extent(renderer)
    marks = [axes.transData.transform((point.x, point.y)) for point in points]
    assert len(boxes) == 4
    for number, box in enumerate(boxes):
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
        assert not any(box.contains(x, y) for x, y in marks)


def test_each_stage_is_named_once_in_the_plot_of_accuracy_against_size(summary):
    plot = accuracy_against_size(parse_summary(summary))
    written = texts(plot.svg)
    for name in ("baseline", "prune", "recover", "distill", "int8"):
        assert written.count(name) == 1
    assert {"200 kB", "500 kB", "1 MB", "2 MB"} <= set(written)
    assert "98.6 % [97.4, 99.4] at 148 kB" in plot.svg


def test_sizes_that_hardly_differ_get_a_plain_axis(summary):
    for stage in [summary["baseline"], *summary["steps"]]:
        stage["measurements"]["size_bytes"]["value"] = 1_000_000 + stage["number"]
    assert "1 MB" in texts(accuracy_against_size(parse_summary(summary)).svg)


def test_latency_has_a_bar_with_its_value_for_each_stage_and_batch(summary):
    written = texts(latency(parse_summary(summary)).svg)
    assert written.count("int8") == 2 and "0.231 ms" in written and "1.12 ms" in written


def test_a_removed_and_a_new_layer_are_both_shown(records):
    before = ({"path": "old", "parameters": 1000}, {"path": "kept", "parameters": 500})
    after = ({"path": "kept", "parameters": 100}, {"path": "new", "parameters": 50})
    tables = [Record(**{**records[0].__dict__, "layers": table}) for table in (before, after)]
    written = texts(layers(tables).svg)
    assert {"1.00 k → 0", "500 → 100", "0 → 50"} <= set(written)
    assert [name for name in written if name in ("old", "kept", "new")] == ["old", "kept", "new"], (
        "in the model's order"
    )


@pytest.mark.parametrize(("value", "ends"), [(1.0, 100), (0.0, 0)])
def test_a_share_that_stays_at_an_end_has_no_axis_beyond_it(summary, records, value, ends):
    history = tuple({"validation": value} for _ in range(4))
    record = Record(**{**records[1].__dict__, "history": history})
    (plot,) = losses(parse_summary(summary), [record])
    ticks = [float(text.replace("−", "-")) for text in texts(plot.svg) if re.fullmatch(r"[−\d.]+", text)]
    assert ends in ticks and min(ticks) >= 0 and max(ticks) <= 100


def test_training_that_restarts_its_epochs_is_counted_on(summary, records):
    twice = Record(**{**records[2].__dict__, "history": records[2].history[:4] * 2})
    (plot,) = losses(parse_summary(summary), [twice])
    assert "8" in texts(plot.svg), "eight epochs"


def test_dollar_signs_and_odd_glyphs_in_names_are_drawn_as_they_stand(records):
    odd = ({"path": "$\\frac{a$", "parameters": 10}, {"path": "層.重み", "parameters": 20})
    written = texts(layers([Record(**{**record.__dict__, "layers": odd}) for record in records[:2]]).svg)
    assert "$\\frac{a$" in written and "層.重み" in written


def test_drawing_leaves_matplotlib_settings_alone_and_heeds_none(summary, records):
    with mpl.rc_context({"font.size": 40, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        drawn = draw_all(parse_summary(summary), records)
        assert dict(mpl.rcParams) == before
    assert drawn == draw_all(parse_summary(summary), records)
