"""Redundancy, zeros, changes and bytes of layers as tables and plots."""

import re

import pytest
import torch
from torch import nn

from tersor.measure.redundancy import redundancy
from tersor.measure.size import storage
from tersor.measure.sparsity import sparsity, structured_against_unstructured, weight_changes
from tersor.report.analysis import Analysis, analysis_plot, analysis_table, analysis_view, render


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture
def analyses():
    model, sparse = network(), network()
    with torch.no_grad():
        sparse[0].weight[:, :, 0] = 0
    return [
        Analysis("Redundancy", redundancy(model), ("near_zero", "zeros")),
        Analysis("Zeros", sparsity(sparse), ("sparsity",)),
        Analysis("Change", weight_changes(model, sparse), ("norm_kept", "quality")),
        Analysis("Structured or not", structured_against_unstructured(model, "0", 0.5), ("quality",)),
        Analysis("Bytes", storage(sparse), ("bytes.dense", "bytes.bitmap", "zip_bytes")),
    ]


def test_every_analysis_has_a_table_and_a_plot_with_its_own_numbers(analyses):
    for analysis in analyses:
        header, cells = analysis_table(analysis.rows)
        assert len(cells) == len(analysis.rows) == analysis_view(analysis.rows).row_count
        assert all(len(row) == len(header) for row in cells)
        plot = analysis_plot(analysis)
        drawn = [re.sub(r"<[^>]+>", "", text).strip() for text in re.findall(r"<text.*?</text>", plot.svg, re.S)]
        assert {row[0] for row in cells} <= {text.replace("&lt;", "<").replace("&gt;", ">") for text in drawn}
    header, cells = analysis_table(analyses[1].rows)
    assert [row[0] for row in cells] == ["0.weight", "2.weight", "<model>"]
    assert cells[0][header.index("zeros")] == "72" and cells[0][header.index("sparsity")] == "0.333"
    assert "0.weight: 0.333; 2.weight: 0; " in analysis_plot(analyses[1]).svg


def test_the_page_holds_them_all_and_escapes_names(analyses):
    hostile = Analysis("<b>", [{"path": "<script>", "tensor": "w", "zeros": 1}], ("zeros",))
    page = render("<i>net</i>", [*analyses, hostile])
    assert page.count('<svg class="plot"') == 6 and "<script>" not in page and "<i>net" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_nothing_to_draw_is_no_plot(analyses):
    assert analysis_plot(Analysis("None", (), ("zeros",))) is None
    assert analysis_plot(Analysis("None", analyses[0].rows, ("no_such",))) is None
    assert "<svg" not in render("empty", [Analysis("None", (), ("zeros",))])
