"""Pictures of the places that are quantized: what they show, hostile names, and figures that are none."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from report_runs import HOSTILE

from graphopt.analysis.numerics import Spread
from graphopt.backend import ExportReport
from graphopt.causes import Cause, Causes
from graphopt.report.layers import MOST_ROWS, bits_of, histogram, layers, worst

SVG = "{http://www.w3.org/2000/svg}"
SPREAD = Spread(-1.0, 2.0, [0, 3, 9], [1, 2, 9])


def _causes(count: int = 2, name: str = "conv") -> Causes:
    def site(k: int) -> Cause:
        weights = f"int{4 + k} by channel"
        return Cause(f"{name}_{k}", "conv2d", count - k, weights=weights, share=1 / count, spreads={"output": SPREAD})

    return Causes([site(k) for k in range(count)])


def _export() -> ExportReport:
    return ExportReport(Path("m.onnx"), 1, 20, node_ms={"conv_0": 1.0}, baseline_node_ms={"conv_0": 2.0, "conv_1": 1.0})


def test_each_place_has_its_bits_its_share_and_its_times_in_the_programs_order() -> None:
    picture = layers(_causes(), _export())
    root = ElementTree.fromstring(str(picture))
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert words[:3] == ["bits of a weight", "share of the error", "milliseconds"]
    assert words[3:] == ["conv_1", "5", "50 %", "conv_0", "4", "50 %"]
    kinds = [each.get("class") for each in root.iter(f"{SVG}rect")]
    assert kinds.count("open") == 2 and kinds.count("mark") == 5


def test_without_times_there_is_no_column_for_them_and_without_sites_no_picture() -> None:
    picture = layers(_causes(), None)
    assert "milliseconds" not in str(picture)
    assert layers(Causes(), None) is None


def test_hostile_names_are_text_and_what_is_no_number_is_left_out() -> None:
    wild = _causes(1, HOSTILE)
    wild.sites[0] = Cause(HOSTILE, "x", weights=f"int4{HOSTILE}", share=math.nan, spreads={HOSTILE: SPREAD})
    export = _export()
    export.node_ms = {HOSTILE: math.inf}
    pictures = [layers(wild, export), *(each for _, found in worst(wild) for _, each in found)]
    for each in pictures:
        ElementTree.fromstring(str(each))
        assert "<script>" not in str(each) and "nan" not in str(each)


def test_a_long_program_is_cut() -> None:
    root = ElementTree.fromstring(str(layers(_causes(MOST_ROWS + 50), None)))
    assert len(list(root.iter(f"{SVG}line"))) == MOST_ROWS


def test_a_histogram_shows_before_and_after() -> None:
    root = ElementTree.fromstring(str(histogram(SPREAD, "weights of conv")))
    kinds = [each.get("class") for each in root.iter(f"{SVG}rect")]
    assert kinds.count("mark") == 3 and kinds.count("outline") == 2  # empty bins are not drawn
    assert [each.text for each in root.iter(f"{SVG}text")] == ["-1", "2"]


def test_bits_by_the_name_of_a_format() -> None:
    assert [bits_of(each) for each in ("int4 in groups of 64", "uint8", "", "float", "int32")] == [4, 8, None, None, 16]
