"""A figure as an SVG element that may stand, with others, within a page."""

import hashlib
import io
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from bridle.report.style import INK, PAPER, STYLE, shown

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
THEMED = {INK: "currentColor", PAPER: "var(--plot-paper, Canvas)"}
"""Ink is the page's text colour, and paper its background: it sets `--plot-paper` or `color-scheme`."""

ElementTree.register_namespace("", SVG)


@rc_context(STYLE)
def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as one `<svg>` element, for inlining into HTML.

    It fills the width of its container and keeps its shape, holds text as text, refers to nothing outside,
    takes ink and paper from the page's theme, and its ids are those of no other figure in the page. The
    same figure gives the same text.

    Args:
        figure: one of the plots.
        title: its name, for screen readers and as a tooltip.
        description: what it shows, for those who cannot see it.
    """
    drawn = _drawn(figure)
    root = ElementTree.fromstring(drawn)
    _remove(root, f"{{{SVG}}}metadata")
    _remove(root, f"{{{SVG}}}defs/{{{SVG}}}style/..")  # its rules would reach the whole page
    prefix = f"plot-{hashlib.sha256((title + drawn).encode()).hexdigest()[:8]}"
    _rename_ids(root, prefix)
    _describe(root, prefix, shown(title, 200), shown(description, 2000))
    return _themed(ElementTree.tostring(root, encoding="unicode"))


def _drawn(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _remove(root: ElementTree.Element, path: str) -> None:
    for element in root.findall(path):
        root.remove(element)


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Puts the prefix before every id that something refers to, and drops the others."""
    links = {value for element in root.iter() for name, value in element.items() if name == HREF}
    clips = {value for element in root.iter() for name, value in element.items() if name == "clip-path"}
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if f"#{name}" in links or f"url(#{name})" in clips:
            element.set("id", f"{prefix}-{name}")
        if HREF in element.attrib:
            element.set("href", f"#{prefix}-{element.attrib.pop(HREF)[1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{prefix}-"))


def _describe(root: ElementTree.Element, prefix: str, title: str, description: str) -> None:
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title", "aria-describedby": f"{prefix}-desc"}
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")  # matplotlib's own rules, for this plot alone
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{prefix}-{tag}"})
        element.text = text
        root.insert(place, element)


def _themed(text: str) -> str:
    for color, themed in THEMED.items():
        text = text.replace(color, themed)
    return text
