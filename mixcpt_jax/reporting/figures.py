"""Figures as inline SVG, each as wide as a phone; the page puts them side by side.

The page's style sheet defines the colors: series have the classes `s0` to `s5`, and are
dashed from the seventh on. Every mark has a <title>, which browsers show and screen readers
read. All text is escaped here.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 38
_COLORS = 6
_LABEL_GAP = 13
_LARGEST = 1e100


# A row of a figure's data: series, x, y, and the bounds of an interval if there is one.
Row = tuple[str, float | str, float, float | None, float | None]


class Figure(NamedTuple):
    """A figure: its title, its SVG and its data."""

    title: str
    svg: str
    rows: Sequence[Row]


class Series(NamedTuple):
    """A line: the number of its color, its name, and its points (x, y)."""

    number: int
    name: str
    points: Sequence[tuple[float, float]]

    @property
    def rows(self) -> list[Row]:
        return [(self.name, x, y, None, None) for x, y in self.points]


class Journey(NamedTuple):
    """An arm's two measures before and after; `start` is None if unknown."""

    number: int
    name: str
    start: tuple[float, float] | None
    end: tuple[float, float]

    @property
    def rows(self) -> list[Row]:
        ends = (f"{self.name}, start", self.start), (f"{self.name}, end", self.end)
        return [(name, *point, None, None) for name, point in ends if point]


class Whisker(NamedTuple):
    """The change of a measure in one arm, with its interval if there is one."""

    number: int
    name: str
    change: float
    interval: tuple[float, float] | None

    def row(self, measure: str) -> Row:
        return self.name, measure, self.change, *(self.interval or (None, None))


class Bar(NamedTuple):
    """A source's share of the tokens, requested and delivered."""

    name: str
    requested: float
    delivered: float

    @property
    def rows(self) -> list[Row]:
        shares = ("requested", self.requested), ("delivered", self.delivered)
        return [(name, self.name, share, None, None) for name, share in shares]


class _Scale:
    """Maps values to pixels; `ticks` are round numbers in the range."""

    def __init__(
        self,
        values: Iterable[float],
        start: float,
        end: float,
        least: float = 1e-6,
        least_step: float = 0.0,
    ):
        """
        Args:
          values: all must lie within the range.
          start, end: pixels of the lowest and the highest value.
          least: smallest width of the range.
          least_step: smallest distance of two ticks; 1 for whole numbers.
        """
        values = [_bounded(value) for value in values] or [0.0]
        low, high = min(values), max(values)
        # Below this distance, float rounding would be visible.
        least = max(least, 1e-6 * max(abs(low), abs(high)))
        pad = max(0.0, least - (high - low)) / 2
        low, high = low - pad, high + pad
        raw = max((high - low) / 5, least_step)
        power = 10 ** math.floor(math.log10(raw))
        multiples = (1, 2, 5, 10) if least_step else (1, 2, 2.5, 5, 10)
        self.step = next(m * power for m in multiples if m * power >= raw)
        first, last = math.floor(low / self.step), math.ceil(high / self.step)
        # At most 12 % of margin: a whole step would be too much.
        self.low = max(first * self.step, low - 0.12 * (high - low))
        self.high = min(last * self.step, high + 0.12 * (high - low))
        self.ticks = [
            round(i * self.step, 12)
            for i in range(first, last + 1)
            if self.low - 1e-12 <= i * self.step <= self.high + 1e-12
        ]
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (_bounded(value) - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def name(self, tick: float, signed: bool = False) -> str:
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        digits += round(self.step * 10**digits, 6) % 1 > 0
        return f"{tick:{'+' if signed and tick else ''},.{digits}f}".replace("-", "−")


def _bounded(value: float) -> float:
    """A value within the range of a scale; a diverged run has perplexities beyond it."""
    return 0.0 if math.isnan(value) else min(max(value, -_LARGEST), _LARGEST)


def style(number: int) -> str:
    """The class of a series."""
    return f"s{number % _COLORS}" + (" dashed" if number >= _COLORS else "")


def lines(
    series: Sequence[Series],
    what: str,
    x_label: str = "step",
    least_step: float = 1.0,
) -> str:
    """Curves, over the steps unless the label says otherwise.

    Args:
      series: the curves.
      what: a description, for screen readers.
      x_label: label of the x axis.
      least_step: smallest distance of two ticks of the x axis.
    """
    steps = (p[0] for s in series for p in s.points)
    x = _Scale(steps, _LEFT, _WIDTH - _RIGHT, least_step=least_step)
    y = _Scale((p[1] for s in series for p in s.points), _HEIGHT - _BOTTOM, _TOP)
    marks = [_axes(x, y, x_label)]
    for one in series:
        points = [(x(a), y(b)) for a, b in one.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        marks.append(f'<g class="{style(one.number)}"><polyline points="{path}"/>')
        if len(points) <= 12:
            marks += [f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>'
                      for a, b in points]  # fmt: skip
        marks += [
            f'<circle class="touch" cx="{a:.1f}" cy="{b:.1f}" r="7">'
            f"<title>{escape(one.name)}, {x_label} {value[0]:g}: {value[1]:.4g}</title>"
            "</circle>"
            for (a, b), value in zip(points, one.points, strict=True)
        ]
        marks.append("</g>")
    return _figure(marks, _HEIGHT, what)


def journeys(arms: Sequence[Journey], x_label: str, y_label: str, what: str) -> str:
    """A plane of two measures, with an arrow for each arm from its start to its end."""
    height = 300
    starts = list(dict.fromkeys(a.start for a in arms if a.start))
    points = [*starts, *(a.end for a in arms)]
    # Leaves room for the names beside the points.
    x = _Scale((p[0] for p in points), _LEFT + 14, _WIDTH - _RIGHT - 56, least=1.0)
    y = _Scale((p[1] for p in points), height - _BOTTOM - 24, _TOP + 26, least=1.0)
    marks = [_axes(x, y, x_label, height)]
    marks.append(f'<text class="axis" x="2" y="{_TOP}">{escape(y_label)}</text>')
    for arm in arms:
        if arm.start and arm.start != arm.end:
            ends = ((x(p[0]), y(p[1])) for p in (arm.start, arm.end))
            marks.append(_arrow(*ends, style(arm.number)))
    labels = []
    for start in starts:
        # If an arm starts at the end of another arm, the dot is already there.
        if start not in [arm.end for arm in arms]:
            place = x(start[0]), y(start[1])
            marks.append(
                f'<text class="name ink" x="{place[0]:.1f}" y="{place[1] + 19:.1f}" '
                'text-anchor="middle">start</text>'
            )
            marks.append(_dot(*place, "ink", f"start: {_pair(start)}", 5.5))
    for arm in arms:
        place = x(arm.end[0]), y(arm.end[1])
        labels.append((*place, arm.name, style(arm.number)))
        text = f"{arm.name}: {_pair(arm.end)}"
        marks.append(_dot(*place, style(arm.number), text, 5))
    marks += _names(labels, height - _BOTTOM - 4)
    return _figure(marks, height, what)


def whiskers(
    rows: Sequence[tuple[str, Sequence[Whisker]]], what: str, x_label: str
) -> str:
    """Changes around zero: in each row a name, and per arm a dot with its interval."""
    lane, above, edge = 12, 28, 22
    values = [0.0]
    for _, arms in rows:
        values += [v for a in arms for v in (a.change, *(a.interval or ()))]
    height = sum(above + lane * len(arms) for _, arms in rows) + _BOTTOM
    x = _Scale(values, edge, _WIDTH - edge)
    bottom = height - _BOTTOM + 6
    marks = []
    for tick in x.ticks:
        kind = "zero" if tick == 0 else "grid"
        marks.append(_line(kind, x(tick), 4, x(tick), bottom))
        marks.append(_tick(x(tick), bottom + 14, x.name(tick, signed=True), "middle"))
    marks.append(
        f'<text class="axis" x="{_WIDTH / 2}" y="{height - 4}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    y = 0.0
    for name, arms in rows:
        marks.append(f'<text class="row" x="4" y="{y + 16}">{escape(name)}</text>')
        y += above
        for arm in arms:
            place, text = x(arm.change), f"{name}, {arm.name}: {arm.change:+.3g}"
            if arm.interval:
                low, high = (x(v) for v in arm.interval)
                text += f" (95 %: {arm.interval[0]:+.3g} to {arm.interval[1]:+.3g})"
                marks.append(
                    f'<g class="{style(arm.number)}">'
                    + _line("whisker", low, y, high, y)
                    + _line("whisker", low, y - 3, low, y + 3)
                    + _line("whisker", high, y - 3, high, y + 3)
                    + "</g>"
                )
            marks.append(_dot(place, y, style(arm.number), text, 4))
            y += lane
    return _figure(marks, height, what)


def bars(sources: Sequence[Bar], what: str) -> str:
    """Shares of a mixture: a bar for the delivered share, a stroke for the requested."""
    row, bottom = 36, 26
    height = row * len(sources) + bottom
    x = _Scale([0.0, 1.0], 4, _WIDTH - 14)
    marks = [_line("grid", x(t), 2, x(t), height - bottom) for t in x.ticks]
    marks += [
        _tick(x(t), height - 8, f"{100 * t:.0f} %", "start" if t == 0 else "middle")
        for t in x.ticks[:-1]
    ]
    for number, source in enumerate(sources):
        y = row * number
        text = (
            f"{source.name}: requested {source.requested:.1%}, "
            f"delivered {source.delivered:.1%}"
        )
        marks.append(
            f'<text class="row" x="4" y="{y + 14}">{escape(source.name)}</text>'
            f'<text class="row value" x="{_WIDTH - 6}" y="{y + 14}" text-anchor="end">'
            f"{100 * source.delivered:.1f} %</text>"
            f'<rect class="bar {style(number)}" x="4" y="{y + 19}" height="11" rx="2" '
            f'width="{max(0.0, x(source.delivered) - 4):.1f}">'
            f"<title>{escape(text)}</title></rect>"
            + _line(
                "requested", x(source.requested), y + 16, x(source.requested), y + 33
            )
        )
    return _figure(marks, height, what)


def _axes(x: _Scale, y: _Scale, x_label: str, height: int = _HEIGHT) -> str:
    bottom = height - _BOTTOM
    marks = []
    for tick in y.ticks:
        marks.append(_line("grid", _LEFT, y(tick), _WIDTH - _RIGHT, y(tick)))
        marks.append(_tick(_LEFT - 6, y(tick) + 4, y.name(tick), "end"))
    marks.append(_line("base", _LEFT, bottom, _WIDTH - _RIGHT, bottom))
    for tick in x.ticks:
        marks.append(_line("base", x(tick), bottom, x(tick), bottom + 4))
        marks.append(_tick(x(tick), bottom + 17, x.name(tick), "middle"))
    marks.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{height - 4}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(marks)


def _arrow(start: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    """An arrow that ends just before the dot that it points to."""
    (a, b), (c, d) = start, end
    length = math.hypot(c - a, d - b)
    if length < 16:
        return f'<g class="{kind}">{_line("arrow", a, b, c, d)}</g>'
    u, v = (c - a) / length, (d - b) / length
    c, d = c - 7 * u, d - 7 * v
    head = ((c, d), (c - 8 * u + 4 * v, d - 8 * v - 4 * u),
            (c - 8 * u - 4 * v, d - 8 * v + 4 * u))  # fmt: skip
    corners = " ".join(f"{p:.1f},{q:.1f}" for p, q in head)
    shaft = _line("arrow", a, b, c - 6 * u, d - 6 * v)
    return f'<g class="{kind}">{shaft}<polygon class="dot" points="{corners}"/></g>'


def _names(labels: list[tuple[float, float, str, str]], lowest: float) -> list[str]:
    """Names beside their points, moved apart if they would overlap."""
    labels = sorted(labels, key=lambda label: label[1])
    places, free = [], -math.inf
    for _, y, _, _ in labels:
        places.append(max(y + 4, free))
        free = places[-1] + _LABEL_GAP
    for i in reversed(range(len(places))):
        places[i] = min(places[i], lowest)
        lowest = places[i] - _LABEL_GAP
    marks = []
    for (x, _, name, kind), place in zip(labels, places, strict=True):
        is_left = x + 10 + 6.5 * len(name) > _WIDTH
        side = (x - 9, "end") if is_left else (x + 9, "start")
        marks.append(
            # The arrow comes from the left, so a name there stands above it.
            f'<text class="name {kind}" x="{side[0]:.1f}" '
            f'y="{place - 11 * is_left:.1f}" text-anchor="{side[1]}">{escape(name)}</text>'
        )
    return marks


def _pair(point: tuple[float, float]) -> str:
    return f"{point[0]:.1f}, {point[1]:.1f}"


def _dot(x: float, y: float, kind: str, text: str, radius: float) -> str:
    title = f"<title>{escape(text)}</title>"
    return (
        f'<g class="{kind}"><circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
        f'<circle class="touch" cx="{x:.1f}" cy="{y:.1f}" r="11">{title}</circle></g>'
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="tick" {place}>{text}</text>'


def _figure(marks: Iterable[str], height: float, what: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(what)}">{"".join(marks)}</svg>'
    )
