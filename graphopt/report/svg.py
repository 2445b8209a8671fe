"""Pictures as SVG: pieces that escape what they are given, styled by the page around them or, alone, by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup


def alone(picture: Markup) -> str:
    """Return a picture as a file of its own, with the colours that a page would give it."""
    style = Markup(
        "<style>text{{font:12px system-ui,sans-serif;fill:#1f2328}}line{{stroke:#d1d9e0}}"
        ".mark{{fill:#0969da}}.open{{fill:#fff;stroke:#59636e}}.ground{{fill:#fff}}</style>"
        '<rect width="100%" height="100%" class="ground"/>'
    ).format()
    return str(picture.replace(Markup("</title>"), Markup("</title>") + style, 1)) + "\n"


def svg(width: int, height: int, parts: Iterable[Markup], title: str) -> Markup:
    """Return a picture of some parts, which says in words what it is."""
    start = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img">')
    named = start.format(width, height) + Markup("<title>{}</title>").format(title)
    return named + Markup("").join(parts) + Markup("</svg>")


def scale(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Return the map from values to places between start and end."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def text(x: float, y: float, words: str, anchor: str = "start") -> Markup:
    """Return words at a place: the start, middle or end of them."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def line(x: float, y: float, to_x: float, to_y: float) -> Markup:
    """Return a straight line."""
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(x, y, to_x, to_y)


def dot(x: float, y: float, radius: float, filled: bool, title: str) -> Markup:
    """Return a disc with a title."""
    made = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" class="{}"><title>{}</title></circle>')
    return made.format(x, y, radius, "mark" if filled else "open", title)


def bar(x: float, y: float, width: float, height: float, filled: bool = True, title: str = "") -> Markup:
    """Return a rectangle with a title."""
    made = Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" class="{}"><title>{}</title></rect>')
    return made.format(x, y, max(width, 0.0), height, "mark" if filled else "open", title)


def short(name: str) -> str:
    """Return a name that fits beside a row: its end where it is long."""
    return name if len(name) <= 38 else "…" + name[-37:]
