"""The style of plots: a colour and marker per method; a page's theme can replace ink and paper."""

import logging
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from matplotlib.font_manager import fontManager

logger = logging.getLogger(__name__)

INK = "#1b1b1f"
PAPER = "#ffffff"
DPI = 200

FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("Noto Sans Devanagari", "Arial Unicode MS"),
)
"""Fonts that may be installed, for characters that matplotlib's own lacks."""
_INSTALLED = {font.name for font in fontManager.ttflist}

# Text stays text, to be selected, searched and read aloud. The salt makes ids the same in every run.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bridle",
    "pdf.fonttype": 42,  # TrueType; publishers refuse type 3
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.family": ["sans-serif", *(name for name in FALLBACKS if name in _INSTALLED)],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; a page falls back to its own
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 6.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
}

LONGEST_NAME = 40  # characters that fit a plot

NO_GLYPH = re.compile(r"Glyph (\d+) .*missing from")

VALUE = re.compile(r"(.+)@(\d[\d.]*(?:e-?\d+)?)$")
"""A method's name with the value of its knob."""


@dataclass(frozen=True)
class MethodStyle:
    """Colour and marker; methods of one family share the colour."""

    color: str
    marker: str
    filled: bool = True

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        face = self.color if self.filled else PAPER
        return {"color": self.color, "marker": self.marker, "markerfacecolor": face, "markeredgewidth": 1.4}


# Hues of Okabe and Ito (2008) for colour-blind readers, a few darker for contrast on white and black.
_STYLES = {
    "base": MethodStyle("#7d7d85", "o"),
    "sft": MethodStyle("#0077bb", "s"),
    "filtration": MethodStyle("#b8860b", "^"),
    "rl": MethodStyle("#c76a9f", "v"),
    "rl-converged": MethodStyle("#c76a9f", "v", filled=False),
    "nado-decoding": MethodStyle("#009e73", "P"),
    "nado-decoding-sft": MethodStyle("#009e73", "X", filled=False),
    "constrained": MethodStyle("#d55e00", "D", filled=False),
    "constrained-adaptive": MethodStyle("#d55e00", "D"),
}
_COLORS = ("#3f9bd8", "#8a63c7", "#7a8f00", "#a5713f", "#2f9a9a")
_FURTHER = [MethodStyle(_COLORS[place % 5], "<>ph"[place % 4]) for place in range(20)]  # no pair comes twice
_OPTIONAL = ("sft-kl", "l2-sp", "lora-small", "wise-ft", "interleave", "interleave@gap", "dpo")
_STYLES |= zip(_OPTIONAL, _FURTHER, strict=False)


def family_of(name: str) -> str:
    """A method's name without the value of its knob."""
    return VALUE.sub(r"\1", name)


def method_style(name: str) -> MethodStyle:
    """The style of a method, the same for all values of its knob; an unknown one gets one of twenty by its name."""
    family = family_of(name)
    return _STYLES.get(family) or _FURTHER[zlib.crc32(family.encode(errors="replace")) % len(_FURTHER)]


def shown(text: str, longest: int = LONGEST_NAME) -> str:
    """Makes a text printable, on one line, and at most `longest` characters."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return printable if len(printable) <= longest else printable[: longest - 1] + "…"


@contextmanager
def missing_glyphs_in_one_line() -> Iterator[None]:
    """Logs once which characters no font has, where matplotlib warns of each whenever it is drawn."""
    lacking: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=NO_GLYPH.pattern)
        show = warnings.showwarning

        def collect(message: Warning | str, *where: Any, **more: Any) -> None:
            if found := NO_GLYPH.match(str(message)):
                lacking.add(chr(int(found[1])))
            else:
                show(message, *where, **more)

        warnings.showwarning = collect  # type: ignore[assignment]  # it passes on what it gets
        yield
    if lacking:
        characters = "".join(sorted(lacking))
        logger.warning("plots: no installed font has %s; the page shows them, PNG and PDF have boxes", characters)
