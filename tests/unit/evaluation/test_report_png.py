"""PNG files show what the SVG files draw: the same marks and text, on every machine."""

import re
import struct
import subprocess
import sys
import zlib
from html import escape
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from builders.evaluations import MODELS, evaluation

from qtool.evaluation.report import OUR_FILES, write_report
from qtool.evaluation.report_page import image_of, plot_files, plot_images, plot_style
from qtool.evaluation.report_png import SCALE, can_draw, plain_style, png
from qtool.evaluation.report_reading import facts_of
from qtool.evaluation.report_svg import text_width

SVG = "{http://www.w3.org/2000/svg}"
WHITE, ACCENT = (255, 255, 255), (0x0B, 0x63, 0xC5)
NAMES = ["kl-against-size.svg", "kl-by-position.svg", "kl-by-domain.svg", "error-by-layer.svg"]


class Picture:
    """The pixels of a PNG with eight bits a channel; https://www.w3.org/TR/png-3/"""

    def __init__(self, data):
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        chunks, place = {}, 8
        while place < len(data):
            (length,) = struct.unpack_from(">I", data, place)
            kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
            assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, place + 8 + length)[0]
            chunks[kind] = chunks.get(kind, b"") + body
            place += 12 + length
        self.width, self.height, bits, color, *_, interlaced = struct.unpack(
            ">IIBBBBB", chunks[b"IHDR"]
        )
        assert (bits, interlaced) == (8, 0)
        self.channels = {2: 3, 6: 4}[color]
        self.pixels = self._unfiltered(zlib.decompress(chunks[b"IDAT"]))

    def _unfiltered(self, data):
        size = self.width * self.channels
        above, rows = np.zeros(size, np.uint8), []
        for row in range(self.height):
            kind, *_ = data[row * (size + 1) : row * (size + 1) + 1]
            line = np.frombuffer(data, np.uint8, size, row * (size + 1) + 1)
            if kind == 1:
                pixels = line.reshape(self.width, self.channels)
                line = np.cumsum(pixels, axis=0, dtype=np.uint8).reshape(-1)
            elif kind == 2:
                line = line + above
            elif kind > 2:
                line = self._guessed(kind, line.tolist(), above.tolist())
            rows.append(line)
            above = line
        return np.stack(rows).reshape(self.height, self.width, self.channels)

    def _guessed(self, kind, line, above):
        back = self.channels
        for i, up in enumerate(above):
            left, corner = (line[i - back], above[i - back]) if i >= back else (0, 0)
            guess = (left + up) // 2
            if kind == 4:
                to_left, to_up = abs(up - corner), abs(left - corner)
                to_corner = abs(left + up - 2 * corner)
                nearest = min(to_left, to_up, to_corner)
                guess = left if to_left == nearest else up if to_up == nearest else corner
            line[i] = (line[i] + guess) & 255
        return np.array(line, np.uint8)

    def at(self, x, y):
        return tuple(self.colors(x, y, x + 1, y + 1).pop())

    def colors(self, left, top, right, bottom):
        """The colours in a rectangle."""
        left, top, right, bottom = (max(0, round(edge)) for edge in (left, top, right, bottom))
        inside = self.pixels[top:bottom, left:right].reshape(-1, self.channels)
        assert self.channels == 3 or (inside[:, 3] == 255).all()
        return {tuple(pixel) for pixel in np.unique(inside[:, :3], axis=0).tolist()}


@pytest.fixture(scope="module")
def drawn():
    facts = facts_of(evaluation())
    images = plot_images(facts)
    return plot_files(facts), {name: Picture(data) for name, data in images.items()}


def frame(svg):
    """Left, top, width and height of a drawing."""
    return [float(value) for value in ET.fromstring(svg).get("viewBox").split()]


def test_a_report_has_a_png_beside_every_svg(tmp_path):
    names = {path.name for path in write_report(evaluation(), tmp_path / "report")}
    assert names == OUR_FILES
    assert {image_of(name) for name in NAMES} <= names
    for name in NAMES:
        page = (tmp_path / "report" / "index.html").read_text()
        assert f'href="{image_of(name)}"' in page
    write_report(evaluation(MODELS[:1]), tmp_path / "report")
    assert not (tmp_path / "report" / "kl-against-size.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_twice_the_drawing_and_white_at_its_edges(drawn, name):
    svgs, pictures = drawn
    picture = pictures[image_of(name)]
    _, _, width, height = frame(svgs[name])
    assert (picture.width, picture.height) == (SCALE * width, SCALE * height)
    # A margin stays free on all sides: nothing is cut off.
    free = 10 * SCALE
    strips = (
        (0, 0, picture.width, free),
        (0, picture.height - free, picture.width, picture.height),
        (0, 0, free, picture.height),
        (picture.width - free, 0, picture.width, picture.height),
    )
    assert [picture.colors(*strip) for strip in strips] == 4 * [{WHITE}]


def test_filled_marks_lie_where_the_svg_says(drawn):
    svgs, pictures = drawn
    for name, marks in (("kl-against-size.svg", 1), ("kl-by-domain.svg", 12)):
        left, top, *_ = frame(svgs[name])
        found = [
            (float(mark.get("cx")) - left, float(mark.get("cy")) - top)
            for mark in ET.fromstring(svgs[name]).iter(f"{SVG}circle")
            if "best" in mark.get("class")
        ]
        assert len(found) == marks
        for x, y in found:
            assert pictures[image_of(name)].at(SCALE * x, SCALE * y) == ACCENT


def test_cells_of_the_heat_map_have_the_colours_of_the_light_theme(drawn):
    svgs, pictures = drawn
    shades = dict(re.findall(r"--(h\d):#(\w{6})", plot_style().partition("@media")[0]))
    left, top, *_ = frame(svgs["error-by-layer.svg"])
    cells = [r for r in ET.fromstring(svgs["error-by-layer.svg"]).iter(f"{SVG}rect")
             if "heat" in r.get("class")]  # fmt: skip
    assert len(cells) > 9 + 60
    for cell in cells:
        x = float(cell.get("x")) + float(cell.get("width")) / 2 - left
        y = float(cell.get("y")) + float(cell.get("height")) / 2 - top
        expected = bytes.fromhex(shades[cell.get("class").split()[1]])
        assert pictures["error-by-layer.png"].at(SCALE * x, SCALE * y) == tuple(expected)


def test_every_text_is_drawn_where_the_svg_says(drawn):
    svgs, pictures = drawn
    for name in NAMES:
        left, top, *_ = frame(svgs[name])
        for element in ET.fromstring(svgs[name]).iter(f"{SVG}text"):
            x, y = float(element.get("x")) - left, float(element.get("y")) - top
            box = {"start": (0, 14), "end": (-14, 0), "middle": (-9, 9)}
            before, after = box[element.get("text-anchor", "start")]
            across, down = (before, after), (-9, 1)
            if element.get("transform"):  # upright
                across, down = (-9, 1), (before, after)
            edges = (x + across[0], y + down[0], x + across[1], y + down[1])
            colors = pictures[image_of(name)].colors(*(SCALE * edge for edge in edges))
            assert len(colors) > 8, (name, element.text)  # edges of letters are smooth


def test_a_plain_style_has_neither_variables_nor_conditions():
    plain = plain_style(plot_style())
    assert not re.search(r"var\(|--|@media|system-ui", plain)
    assert plain.count("{") == plain.count("}") > 30
    assert ".plot .best-bar{stroke:#0b63c5}" in plain
    style = ".a{--x:#fff;--y:#000;fill:var(--x)}@media (c:d){.a{--x:#111}}.b{stroke:var(--y)}"
    assert plain_style(style) == ".a{fill:#fff}.b{stroke:#000}"


def letters(text, attributes=""):
    words = f'<text x="4" y="18" {attributes}>{escape(text)}</text>'
    return png(f'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="24">{words}</svg>')


def test_every_sign_of_a_plot_has_a_letter_of_its_own():
    """Where a font has none, all signs look like the same empty box, or like nothing."""
    signs = "ABCaz09_-.,:;%()+/<>=&*~|'ÄéßñłŻΩλΔжЯ·±…≤\u2212\u00d7⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
    pictures = {letters(sign) for sign in signs}
    assert len(pictures) == len(signs)
    assert letters(" ") not in pictures
    assert letters("\ue000") not in pictures


@pytest.mark.parametrize("bold", [False, True])
@pytest.mark.parametrize(
    "text",
    ["SmolLM2-135M-Instruct-AWQ-w4g64", "Q4_K_M", "WMwm@%", "0123456789", "gate: kld<=0.05",
     "noise floor: bfloat16", "KL divergence (nats per token)",
     "illicit.filter", "±·…⁻⁹", "модель"],
)  # fmt: skip
def test_text_is_drawn_no_wider_than_labels_suppose(text, bold):
    weight = ' font-weight="600"' if bold else ""
    words = f'<text x="10" y="20" font-size="12"{weight}>{escape(text)}</text>'
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="500" height="30">'
    ink = (Picture(png(f"{frame}{words}</svg>")).pixels[..., :3] < 128).all(axis=2)
    (columns,) = np.nonzero(ink.any(axis=0))
    drawn = (columns.max() + 1) / SCALE - 10
    assert drawn <= text_width(text, bold=bold) < 1.5 * drawn


def test_bold_letters_are_not_those_of_regular_ones():
    assert letters("ab", 'font-weight="600"') != letters("ab")


def test_fonts_of_the_machine_are_not_used():
    """A machine with Chinese fonts draws the same box for every letter as one without."""
    assert letters("模") == letters("型") == letters("\ue000")


def test_fonts_are_found_without_importing_what_brings_them():
    code = (
        "import sys; from qtool.evaluation.report_png import font_files\n"
        "print([font.name for font in font_files()], 'matplotlib' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['DejaVuSans.ttf', 'DejaVuSans-Bold.ttf'] False"


@pytest.mark.parametrize("missing", ["resvg_py", "matplotlib"])
def test_without_the_extra_only_the_png_files_are_left_out(tmp_path, monkeypatch, missing):
    assert can_draw()
    write_report(evaluation(), tmp_path / "report")
    monkeypatch.setitem(sys.modules, missing, None)
    assert not can_draw()
    names = {path.name for path in write_report(evaluation(), tmp_path / "report")}
    assert names == {name for name in OUR_FILES if not name.endswith(".png")}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    page = (tmp_path / "report" / "index.html").read_text()
    assert ".png" not in page
    assert all(f'href="{name}"' in page for name in NAMES)


@pytest.mark.parametrize("name", ["模型-量化", "мод", "a&b<c", "\x1b[2J", "@media{x", "var(--ink)"])
def test_no_name_keeps_a_picture_from_being_drawn(name):
    value = evaluation()
    for result in value["results"]:
        result["model"] += name
    value["reference"]["model"] = name
    assert len(plot_images(facts_of(value))) == 4


def test_a_plot_without_figures_is_no_picture():
    assert list(plot_images(facts_of(evaluation(MODELS[:1])))) == [
        "kl-by-position.png", "kl-by-domain.png", "error-by-layer.png"]  # fmt: skip
    assert plot_images(facts_of({})) == {}
