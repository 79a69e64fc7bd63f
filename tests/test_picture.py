"""Pictures are valid XML, their shapes stand where the numbers say, and they show what is drawn."""

import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from config import MODELS
from picture import HEIGHT, WIDTHS, Panel, Series, draw, even_ticks, series_colours, short, spread
from roofline import Workload, weight_bytes
from scripts.draw_round import BAR, OUT, Round, draw_round

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"
HARD = 'a < b & "c" \x1b\ud800 é'  # what XML has no room for, and what has to be escaped
SERIES = (Series(HARD, {1: 0.5, 4: 2.0}, {1: 0.7, 2: 0.8, 4: 1.9}, {4: 1.5}),
          Series("later", {2: 1.0}, {2: 1.1}))  # fmt: skip


def shapes(svg: str, tag: str) -> list[dict[str, str]]:
    return [e.attrib | {"text": e.text or ""} for e in ElementTree.fromstring(svg).iter(SVG + tag)]


def picture() -> str:
    panels = [Panel("one", "x", "y", SERIES), Panel("two", "x", "y", SERIES[:1], reference=None)]
    return draw(HARD, "note", panels, {"line": "predicted", "points": "measured"})


def test_any_text_gives_valid_xml():
    words = [e["text"] for e in shapes(picture(), "text")]
    assert words.count('a < b & "c" ?? é') == 3 and {"predicted", "measured", "later"} < {*words}
    assert picture() == picture()


def test_points_stand_where_log2_of_x_and_y_say():
    panel = Panel("one", "x", "y", SERIES[:1])
    svg = draw("t", "n", [panel], {})
    ticks = [e for e in shapes(svg, "text") if e["class"] == "muted small"]
    xs = {e["text"]: float(e["x"]) for e in ticks if e.get("text-anchor") == "middle"}
    ys = {float(e["text"]): float(e["y"]) - 4 for e in ticks if e.get("text-anchor") == "end"}
    assert xs["4"] - xs["1"] == WIDTHS[0] and xs["2"] == (xs["1"] + xs["4"]) / 2
    assert max(ys.values()) - min(ys.values()) == HEIGHT and min(ys) <= 0.5 and max(ys) >= 2
    low, high = min(ys), max(ys)
    dots = shapes(svg, "circle")
    for x, y in ((4, 1.5), (1, 0.7), (2, 0.8), (4, 1.9)):
        at = ys[low] - HEIGHT * (y - low) / (high - low)
        dot = dots.pop(0)
        assert float(dot["cx"]) == xs[str(x)] and float(dot["cy"]) == pytest.approx(at, abs=0.1)
    assert not dots
    (reference,) = (e["d"] for e in shapes(svg, "path") if "dashed" in e["class"])
    assert f",{ys[1.0]:.1f}L" in reference


def test_panels_side_by_side_have_the_same_levels():
    svg = picture()
    levels = [e["text"] for e in shapes(svg, "text") if e.get("text-anchor") == "end"]
    assert levels[: len(levels) // 2] == levels[len(levels) // 2 :] and len(levels) % 2 == 0


def test_every_class_has_a_colour_on_light_and_on_dark_pages():
    """As each is used: a class without a rule would be black on black."""
    for svg in (picture(), OUT.read_text(encoding="utf-8")):
        light, dark = re.search("<style>(.*)</style>", svg)[1].split("@media")
        assert "prefers-color-scheme:dark" in dark
        colours = [dict(re.findall(r"\.([\w-]+){color:(#\w{6})}", part)) for part in (light, dark)]
        assert colours[0].keys() == colours[1].keys()
        assert all(colours[0][name] != colours[1][name] for name in colours[0])
        for tag in ("text", "path", "circle", "rect"):
            for e in shapes(svg, tag):
                assert len(colours[0].keys() & set(e["class"].split())) == 1, e
        assert not re.search(r'(fill|stroke|style)="', svg)


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_labels_can_be_read_on_both_pages(n):
    """WCAG's contrast of at least 4.5 with GitHub's pages; no two series look the same."""
    pairs = series_colours(n).values()
    for theme, page in enumerate(("#ffffff", "#0d1117")):
        for pair in pairs:
            light = sorted((luminance(pair[theme]) + 0.05, luminance(page) + 0.05))
            assert light[1] / light[0] >= 4.5
        assert len({pair[theme] for pair in pairs}) == n


def test_ticks_are_round_and_enclose():
    for low, high in (
        (0.5, 2.0),
        (1, 1),
        (0, 0),
        (0.98, 1.0),
        (0.4, 31),
        (-3, 1e6),
        (1, 1 + 1e-12),
    ):
        ticks = even_ticks(low, high)
        steps = {round(b - a, 9) for a, b in zip(ticks, ticks[1:], strict=False)}
        assert 4 <= len(ticks) <= 8 and len(steps) == 1 and ticks[0] <= low <= high <= ticks[-1]
        (step,) = steps
        assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)
    assert [short(n) for n in (512, 1000, 4096, 100_000)] == ["512", "1,000", "4k", "100,000"]


def test_labels_that_would_touch_are_pushed_apart():
    assert spread([50, 10, 52, 51], 16, 100) == [50, 10, 82, 66]
    assert spread([98, 97], 16, 100) == [100, 84]
    assert spread([], 16, 100) == []
    crossing = [
        Series("low", {1: 5, 2: 1}),
        Series("middle", {1: 4, 2: 3}),
        Series("high", {2: 3.1}),
    ]
    svg = draw("t", "n", [Panel("one", "x", "y", crossing)], {})
    at = {e["text"]: float(e["y"]) for e in shapes(svg, "text")}
    assert at["high"] <= at["middle"] - 16 < at["low"] - 16


def test_what_has_no_values_is_refused():
    with pytest.raises(ValueError, match="nothing to draw of 'empty'"):
        Series("empty")


def test_the_picture_of_a_round_is_that_of_the_numbers():
    """Drawn anew; its bars have the length of what is read, counted here in another way."""
    r = Round("llama-3.1-8b", Workload(32, 32768), 4, 512)
    svg = draw_round(r)
    assert svg == OUT.read_text(encoding="utf-8")
    weights = weight_bytes(MODELS["llama-3.1-8b"], r.w)
    kv = 2 * 32 * 8 * 128 * 2 * 32  # bytes of a token of all rows
    drafts, check = 4 * (weights + 512 * kv), weights + 32768 * kv
    tokens = sum(0.823**i for i in range(5))
    bars = [e for e in shapes(svg, "rect") if e["height"] == "22.0"]
    lengths = {y: sum(float(e["width"]) + 1 for e in bars if e["y"] == y) for y in
               dict.fromkeys(e["y"] for e in bars)}  # fmt: skip
    ours, plain = lengths.values()
    assert plain == pytest.approx(BAR, abs=1)
    assert ours / plain == pytest.approx((drafts + check) / (tokens * check), rel=0.01)
    words = " ".join(e["text"] for e in shapes(svg, "text"))
    assert f"{(drafts + check) / 1e9:.0f} GB, one round" in words
    assert f"{tokens * check / (drafts + check):.1f} times as much" in words


@pytest.mark.parametrize("flags, words", [
    (["--gamma", "7"], "gamma 7 must be in 1..6"),
    (["--draft_budget", "40000"], "draft_budget 40000 must be in 1..32767"),
    (["--draft_budget", "64"], "no acceptance is known for a budget of 64"),
    (["--model", "gpt-5"], "model 'gpt-5' is unknown"),
    (["--out", "/nowhere/a.svg"], "cannot write /nowhere/a.svg"),
])  # fmt: skip
def test_a_round_that_cannot_be_drawn_is_told_in_one_line(capsys, flags, words):
    from scripts.draw_round import main

    assert main(flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_drawing_needs_no_torch(tmp_path):
    out = tmp_path / "a.svg"
    command = [sys.executable, "-E", "-S", "scripts/draw_round.py", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert out.read_bytes() == OUT.read_bytes()
