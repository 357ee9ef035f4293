"""`vlbridge plot`: every value is where it belongs in the drawing."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlbridge import cli
from megatron_vlbridge.errors import VLBridgeError
from megatron_vlbridge.training.metrics.columns import COLUMNS, LOSSES
from megatron_vlbridge.training.metrics.csv_file import CsvFile
from megatron_vlbridge.training.metrics.plot import name, plot, short, svg, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    file = CsvFile(tmp_path / "run.csv")
    for iteration, loss in ((1, 4.0), (2, 2.0), (3, math.nan), (5, 1.0)):
        file.append({"iteration": iteration, "lm_loss": loss, "images": 3, "z_loss": None})
    return file.path


def panels(path: Path) -> dict[str, ET.Element]:
    """Each panel by its title."""
    root = ET.fromstring(path.read_text())
    return {str(panel.findtext(f"{SVG}text")): panel for panel in root.iter(f"{SVG}g")}


def places(panel: ET.Element) -> list[tuple[float, float]]:
    line = panel.find(f"{SVG}path")
    assert line is not None
    numbers = [float(number) for number in re.findall(r"-?[0-9.]+", line.attrib["d"])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def height_of(panel: ET.Element, label: str) -> float:
    """Where the line of an axis value is."""
    at_axis = [one for one in panel.iter(f"{SVG}text") if one.text == label and one.attrib.get("text-anchor") == "end"]
    text = at_axis[0]
    return float(text.attrib["y"]) - 4


def test_columns_with_values_are_drawn_and_points_are_at_their_values(metrics: Path) -> None:
    drawn = panels(plot(metrics))
    assert list(drawn) == ["lm loss", "images"]
    panel = drawn["lm loss"]
    first, second, third, again = places(panel)
    assert third == again
    assert [first[1], second[1], third[1]] == pytest.approx([height_of(panel, label) for label in ("4", "2", "1")])
    # Iterations 1, 2 and 5 from the left to the right end.
    assert second[0] - first[0] == pytest.approx((third[0] - first[0]) / 4, abs=0.1)
    assert first[0] < third[0]
    assert first[1] < second[1] < third[1]


def test_a_single_value_is_drawn(tmp_path: Path) -> None:
    CsvFile(tmp_path / "m.csv").append({"iteration": 4, "tokens": 7})
    drawn = panels(plot(tmp_path / "m.csv"))
    assert places(drawn["tokens"])[0] == places(drawn["tokens"])[1]


def test_the_target_is_svg_or_html(metrics: Path, tmp_path: Path) -> None:
    assert plot(metrics) == tmp_path / "run.svg"
    page = plot(metrics, tmp_path / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert (tmp_path / "run.svg").read_text() in page
    for target in ("run.png", "run"):
        with pytest.raises(VLBridgeError, match=r"ends in \.svg or \.html"):
            plot(metrics, tmp_path / target)
    with pytest.raises(VLBridgeError, match="cannot write"):
        plot(metrics, tmp_path / "nowhere" / "x.svg")


def test_a_file_without_rows_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(VLBridgeError, match=r"m\.csv: expected rows"):
        plot(tmp_path / "m.csv")


def test_every_column_has_a_title() -> None:
    titles = [name(column) for column in COLUMNS[1:]]
    assert len(set(titles)) == len(titles)
    assert set(LOSSES.values()) < set(titles)


def test_panels_stand_beside_and_below_each_other() -> None:
    drawn = svg([(str(number), [(1.0, 2.0)]) for number in range(5)])
    corners = [tuple(map(int, found)) for found in re.findall(r"translate\((\d+),(\d+)\)", drawn)]
    assert len(set(corners)) == 5
    width, height = map(int, re.findall(r'(?:width|height)="(\d+)"', drawn)[:2])
    assert all(3 * x <= 2 * width and 2 * y <= height for x, y in corners)


def test_titles_are_escaped() -> None:
    assert "a &lt; b" in svg([("a < b", [(1.0, 2.0)])])


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
def test_ticks_are_few_and_enclose_the_values(low: float, size: float) -> None:
    high = low + size
    if size < abs(low) * 1e-6:
        return
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    assert found == sorted(set(found))
    step = found[1] - found[0]
    assert found[0] <= low + 1e-9 * step
    assert found[-1] >= high - 1e-9 * step
    assert low - found[0] < step * 1.001
    assert found[-1] - high < step * 1.001


def test_values_at_an_axis_are_short() -> None:
    values = {0.0: "0", 1.0: "1", 999.0: "999", 1500.0: "1.5k", -2e6: "-2M", 0.25: "0.25", 2e-7: "2e-07", 3e18: "3E"}
    assert {value: short(value) for value in values} == values
    assert ticks(2.0, 2.0) == [2.0]
    assert ticks(0.13, 0.47) == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_the_command_draws(metrics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(metrics)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.svg'}\n"
    assert cli.main(["plot", str(metrics), "-o", str(tmp_path / "x.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"done": str(tmp_path / "x.html")}
    assert cli.main(["plot", str(tmp_path / "none.csv")]) == 1
    assert "none.csv: no such file" in capsys.readouterr().err
