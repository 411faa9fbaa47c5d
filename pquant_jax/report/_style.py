"""How every picture looks, and how it becomes a deterministic SVG text."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pquant_jax._errors import ToolError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every kind of colour blindness
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, YELLOW = "#CC79A7", "#56B4E9", "#222222", "#F0E442"
CYCLE: Final = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, YELLOW)
INK, MUTED, GRID, RANGE, PRUNED = "#222B36", "#5B6673", "#E3E7EB", "#D5DBE1", "#F6E0D0"

STYLE: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # names come from users: a lone $ must not be mathematics
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9AA5B1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "pquant_jax",
}
PAIR: Final = (4.9, 4.3)  # inches of the pictures that stand side by side on the page
SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def render(draw: Callable[[Figure], Any], size: tuple[float, float], label: str) -> str:
    """The SVG text of the figure that `draw` fills; equal calls give equal texts.

    size: width and height in inches.  label: what a screen reader says.  The text has no XML header, so that it can
    stand in a page.  Raises `ToolError` without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ToolError(f"pictures need matplotlib ({error}); pip install 'pquant-jax[plots]'") from error
    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        # the metadata would hold the date and addresses of vocabularies
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r"^<svg ", f'<svg role="img" aria-label="{html.escape(printable(label))}" ', svg)


def message(text: str) -> str:
    """An SVG that only says `text`: for a picture that has nothing to show."""
    return render(lambda figure: figure.text(0.5, 0.5, text, ha="center", va="center", color=MUTED), (6, 1.2), text)


def printable(text: str, limit: int = 80) -> str:
    """`text` without what XML or a line of a plot can't hold, cut in the middle beyond `limit` characters.

    >>> printable("a\\x00b"), printable("abcdefghij", 5)
    ('a?b', 'ab…ij')
    """
    text = "".join(c if c.isprintable() else "?" for c in str(text))
    half = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


def short_name(name: str, limit: int = 38) -> str:
    """`name` with its longest path components abbreviated until it has `limit` characters: what differs stays.

    >>> short_name("TransformerEncoder_0/Block_3/MultiHeadDotProductAttention_0/query")
    'Tran…_0/Block_3/Mult…_0/query'
    """
    parts = printable(name, 10_000).split("/")
    while sum(map(len, parts)) + len(parts) - 1 > limit and max(map(len, parts)) > 9:
        longest = max(range(len(parts)), key=lambda index: len(parts[index]))
        parts[longest] = f"{parts[longest][:4]}…{parts[longest][-2:]}"
    return printable("/".join(parts), limit)


def integer_axes(*axes: Any) -> None:
    """Ticks at whole numbers only, however short an axis is."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))


def power_of_two(exponent: float) -> str:
    """2 to a whole exponent, with a superscript instead of mathtext.

    >>> power_of_two(-12)
    '2⁻¹²'
    """
    return "2" + str(round(exponent)).translate(SUPERSCRIPTS)


def short_number(value: float) -> str:
    """A tick label: k, M and G for thousands, millions and billions.

    >>> [short_number(v) for v in (0.05, 20, 2500, 3e6)]
    ['0.05', '20', '2.5k', '3M']
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5 per decade over a short range low..high, at decades over a long one; no mathtext labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 100 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_formatter(NullFormatter())


def shades(n: int, lightest: float = 0.18) -> Colormap:
    """`n` blues from light to dark; lightest = 0 starts at white.  Readable in print and with any colour vision."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    blues = matplotlib.colormaps["Blues"]
    return ListedColormap([blues(lightest + (1 - lightest) * j / max(n - 1, 1)) for j in range(max(n, 1))])


def diverging() -> Colormap:
    """Vermilion below 0, white at 0, blue above: told apart with every kind of colour blindness."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("pquant_jax", [VERMILION, "#FFFFFF", BLUE])


def bare(axes: Axes) -> None:
    """Take the grid, the frame and the tick marks away: for heat maps."""
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
