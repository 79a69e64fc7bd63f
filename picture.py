"""Line charts as SVG: measured points over predicted lines. Text in, text out, nothing to install.

    print(draw("Speedup", "note", [Panel("by batch", "batch size", "speedup", series)]))

An SVG is text: shapes with coordinates, y growing downward. So a chart is two scales and some
f-strings. A value v becomes a place on the page by

    x = left + width * (log2 v - log2 first) / (log2 last - log2 first)
    y = bottom - height * (v - low) / (high - low)

Batch sizes and lengths are doubled from one to the next, which makes equal steps on a log2 axis.

* **Every colour is a class.** A page may be light or dark, and so may be what a README's <img> is
  shown on. The background is left transparent, and a media query in the style has all colours once
  more. No colour stands in a shape itself.
* **Series are in order** (short to long, small to large): their colours go from cold to hot, and
  each has its label at its own end. Labels that would touch are pushed apart.
* **The same input gives the same bytes**: a picture can be compared with a drawing of its data.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
# Class of text or line: its colour on light and on dark pages.
INK = {
    "ink": ("#1f2328", "#f0f6fc"),
    "muted": ("#59636e", "#9aa4af"),
    "rule": ("#d8dee4", "#343b44"),
}
COLD_TO_HOT = (("#2f6fde", "#6cb0ff"), ("#8b45c9", "#c297ff"), ("#cf2f74", "#ff7eb3"),
               ("#b85c00", "#ffb357"))  # fmt: skip
WIDTHS, HEIGHT = (460, 300), 250  # of the plot, alone on the page or beside another; of all
MARGINS = 52, 58, 100, 56  # left, above, right, below
HEAD, LABEL, MIN_GAP = 78, 16, 24  # height of title, note and legend; of a label; between ticks


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: y by x, x above 0. Not all of the three may be empty (ValueError)."""

    label: str
    line: dict[float, float] = field(default_factory=dict)  # predicted
    points: dict[float, float] = field(default_factory=dict)  # measured, filled
    rings: dict[float, float] = field(default_factory=dict)  # measured in another way, hollow

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"there is nothing to draw of {self.label!r}")

    @property
    def values(self) -> list[tuple[float, float]]:
        """All that is drawn of it."""
        return [*self.line.items(), *self.points.items(), *self.rings.items()]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes, with at least one series."""

    title: str
    x_title: str
    y_title: str
    series: Sequence[Series]
    reference: float | None = 1.0  # a dashed horizontal line


def blend(low: str, high: str, share: float) -> str:
    """The colour that lies that share of the way between two of the form #rrggbb."""
    pairs = ((int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def look_of(i: int, n: int) -> str:
    """The class of series i of n."""
    return f"s{i}-{n}"


def series_colours(n: int) -> dict[str, tuple[str, str]]:
    """Classes of n series, and their colours on light and on dark pages."""
    colours, last = {}, len(COLD_TO_HOT) - 1
    for i in range(n):
        stop = last * i / max(n - 1, 1)
        before = min(int(stop), last - 1)
        ends = zip(COLD_TO_HOT[before], COLD_TO_HOT[before + 1], strict=True)
        light, dark = (blend(low, high, stop - before) for low, high in ends)
        colours[look_of(i, n)] = light, dark
    return colours


def svg(size: tuple[float, float], title: str, series: Iterable[int], shapes: Iterable[str]) -> str:
    """A whole file: shapes, and what their classes look like on light and on dark pages.

    A class is a colour (ink, muted, rule, or `look_of` a series; `series` has how many there are)
    or what is done with it: `line` and `ring` are drawn, text and `fill` are filled.
    """
    colours = INK.copy()
    for n in sorted(series):
        colours |= series_colours(n)
    light, dark = ("".join(f".{name}{{color:{c[i]}}}" for name, c in colours.items())
                   for i in (0, 1))  # fmt: skip
    style = (
        f"text{{font:13px {FONT}}}.title{{font-size:17px;font-weight:600}}"
        ".strong{font-weight:600}.small{font-size:12px}.soft{opacity:.85}text,.fill{fill:currentColor}"
        ".line,.ring{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}"
        ".line.thin{stroke-width:1}.dashed{stroke-dasharray:5 4}.ring{stroke-width:1.5;opacity:.8}"
        f"{light}@media(prefers-color-scheme:dark){{{dark}}}"
    )
    width, height = size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img">\n<title>{xml(title)}</title>\n'
        f"<style>{style}</style>\n" + "".join(f"{shape}\n" for shape in shapes) + "</svg>\n"
    )


def xml(words: str) -> str:
    """Words as a part of XML, which has no control characters, not even escaped ones."""
    return escape(re.sub("[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", words))


def text(x: float, y: float, words: str, look: str = "ink", anchor: str = "start") -> str:
    """Words at a place of the page; `anchor` is start, middle or end."""
    where = f'x="{x:.1f}" y="{y:.1f}"' + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    return f'<text {where} class="{look}">{xml(words)}</text>'


def path(places: Iterable[tuple[float, float]], look: str) -> str:
    """A line through places of the page."""
    return (
        f'<path class="line {look}" d="M' + "L".join(f"{x:.1f},{y:.1f}" for x, y in places) + '"/>'
    )


def dot(x: float, y: float, look: str) -> str:
    """A point; `look` has fill or ring, and a colour."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.8" class="{look}"/>'


def short(n: float) -> str:
    """4k for 4096, 1,000 for 1000: what stands below a tick."""
    return f"{n / 1024:g}k" if n >= 1024 and n % 1024 == 0 else f"{n:,g}"


def even_ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, evenly spaced, that enclose both."""
    span = max(high - low, abs(high) / 10, 1e-6)
    low, high = (low + high - span) / 2, (low + high + span) / 2
    rough = span / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 9) for i in range(first, last + 1)]


def spread(places: list[float], room: float, bottom: float) -> list[float]:
    """The same places in the same order, pushed apart until each has room; none below the bottom.

    Places are y on the page: further down is more.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + room)
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - room if i + 1 < len(moved) else bottom)
    return [moved[order.index(i)] for i in range(len(places))]


def draw_panel(
    panel: Panel,
    levels: list[float],  # ticks of the y axis, ascending
    left: float,  # of the plot
    top: float,
    width: float,
) -> list[str]:
    """The shapes of a panel."""
    bottom = top + HEIGHT
    xs = sorted({x for s in panel.series for x, _ in s.values})
    octaves = math.log2(xs[-1] / xs[0])

    def place(x: float, y: float) -> tuple[float, float]:
        share = math.log2(x / xs[0]) / octaves if octaves else 0.5
        return left + width * share, bottom - HEIGHT * (y - levels[0]) / (levels[-1] - levels[0])

    def across(level: float, look: str) -> str:
        y = place(xs[0], level)[1]
        return path([(left, y), (left + width, y)], look)

    middle = left + width / 2
    shapes = [text(left - 40, top - 34, panel.title, "ink strong"),
              text(left - 40, top - 16, panel.y_title, "muted small"),
              text(middle, bottom + 40, panel.x_title, "muted small", "middle")]  # fmt: skip
    for level in levels:
        y = place(xs[0], level)[1]
        shapes += [across(level, "rule thin"),
                   text(left - 8, y + 4, f"{level:g}", "muted small", "end")]  # fmt: skip
    named = -math.inf
    for x in xs:
        if (at := place(x, 0)[0]) - named > MIN_GAP:
            shapes.append(text(at, bottom + 20, short(x), "muted small", "middle"))
            named = at
    shapes += [] if panel.reference is None else [across(panel.reference, "muted thin dashed")]
    ends = []
    for i, s in enumerate(panel.series):
        look = look_of(i, len(panel.series))
        places = [place(*v) for v in sorted(s.line.items())]
        shapes += (
            [path(places, look)] if len(places) > 1 else [dot(*v, f"fill {look}") for v in places]
        )
        shapes += [dot(*place(*v), f"ring {look}") for v in sorted(s.rings.items())]
        shapes += [dot(*place(*v), f"fill {look}") for v in sorted(s.points.items())]
        ends += [(s.label, look, *place(*max((s.line or s.points or s.rings).items())))]
    rows = spread([y for *_, y in ends], LABEL, bottom)
    return shapes + [text(x + 10, y + 4, label, f"{look} strong small")
                     for (label, look, x, _), y in zip(ends, rows, strict=True)]  # fmt: skip


def draw(title: str, note: str, panels: Sequence[Panel], marks: dict[str, str]) -> str:
    """Panels side by side, with the same levels, under a title, a note and a legend.

    `marks` says what a line, points and rings stand for: {"line": "predicted", ..}.
    """
    (left, above, right, below), width = MARGINS, WIDTHS[len(panels) > 1]
    shapes, x = [text(12, 26, title, "title ink"), text(12, 48, note, "muted small")], 12.0
    for kind, words in marks.items():
        sample = {
            "line": path([(x, 68), (x + 22, 68)], "muted"),
            "points": dot(x + 15, 68, "fill muted"),
            "rings": dot(x + 15, 68, "ring muted"),
        }
        shapes += [sample[kind], text(x + 28, 72, words, "ink small")]
        x += 52 + 6.4 * len(words)
    ys = [y for panel in panels for s in panel.series for _, y in s.values]
    ys += [panel.reference for panel in panels if panel.reference is not None]
    levels = even_ticks(min(ys), max(ys))
    step = left + width + right
    for i, panel in enumerate(panels):
        shapes += draw_panel(panel, levels, left + i * step, HEAD + above, width)
    size = len(panels) * step, HEAD + above + HEIGHT + below
    return svg(size, title, {len(panel.series) for panel in panels}, shapes)
