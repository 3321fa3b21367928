"""Converts a figure to an SVG element for inlining into a page that allows no styles."""

import hashlib
import io
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure

from bridle.report.style import INK, PAPER, STYLE, shown

PIXELS = 1.25  # of the page for each point of a plot
SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
THEMED = {INK: "currentColor", PAPER: "var(--plot-paper, Canvas)"}
"""Ink becomes the page's text colour, paper its background, which `--plot-paper` or `color-scheme` sets."""

ElementTree.register_namespace("", SVG)


@rc_context(STYLE)
def svg(figure: Figure, title: str, description: str) -> str:
    """Converts a figure to one `<svg>` element with unique ids, the page's colours, and no outside references.

    Args:
        figure: one of the plots.
        title: name for screen readers and the tooltip.
        description: description for screen readers.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    root = ElementTree.fromstring(drawn)
    for path in ("metadata", f"defs/{{{SVG}}}style/.."):  # the rules of a style would apply to the whole page
        for element in root.findall(f"{{{SVG}}}{path}"):
            root.remove(element)
    _styles_as_attributes(root)
    prefix = f"plot-{hashlib.sha256((title + drawn).encode()).hexdigest()[:8]}"
    _rename_ids(root, prefix)
    _describe(root, prefix, shown(title, 200), shown(description, 2000))
    text = ElementTree.tostring(root, encoding="unicode")
    for color, themed in THEMED.items():
        text = text.replace(color, themed)
    return text


def _styles_as_attributes(root: ElementTree.Element) -> None:
    """Replaces style attributes, which the page refuses, by presentation attributes."""
    for element in root.iter():
        for declaration in filter(None, element.attrib.pop("style", "").split(";")):
            name, _, value = declaration.partition(":")
            element.set(name.strip(), value.strip())


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Prefixes every id that is referred to, and drops the others."""
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
    for unused in ("height", "version"):
        root.attrib.pop(unused, None)
    root.set("width", str(round(PIXELS * float(root.attrib["viewBox"].split()[2]))))
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title", "aria-describedby": f"{prefix}-desc"}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}  # matplotlib's rules, for this plot only
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{{SVG}}}{tag}", {"id": f"{prefix}-{tag}"})
        element.text = text
        root.insert(place, element)
