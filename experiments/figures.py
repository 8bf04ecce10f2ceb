"""What the figures of all studies share: how an arm looks, light and dark, and files."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple


class Style(NamedTuple):
    """How a plot shows an arm: the label beside its curve, color and marker."""

    label: str
    color: str
    marker: str


# The arms that carry the claims. The colors are those of Okabe and Ito, which readers with
# any common color blindness tell apart.
STYLES = {
    "plain": Style("plain CPT", "#000000", "s"),
    "mixture_ntp": Style("mixture, NTP", "#D55E00", "^"),
    "mixture_lssd20": Style("mixture,\n0.8 NTP +\n0.2 LSSD", "#0072B2", "o"),
    "ntp_kl": Style("NTP on domain,\nKL on general", "#009E73", "D"),
    "mixture_lssd": Style("mixture, LSSD alone", "#CC79A7", "v"),
    "self_replay": Style("replay of own samples,\nno general data", "#E69F00", "P"),
    "plain_merged": Style("plain CPT, merged\nwith the start", "#56B4E9", "X"),
}
# Theme -> matplotlib's settings; the colors are those of pages on GitHub.
_THEMES = {"light": ("#FFFFFF", "#1F2328"), "dark": ("#0D1117", "#E6EDF3")}
# What the dark theme shows brighter.
_BRIGHTER = {"#000000": "#E6EDF3", "#0072B2": "#58A6FF"}


def pyplot() -> Any:
    """matplotlib's pyplot, without a display."""
    # Imported here: tables need no plots, and it is slow.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def ticks(*places: float) -> Any:
    """matplotlib's locator of an axis with ticks at these places."""
    from matplotlib import ticker

    return ticker.FixedLocator(places)


def save_themes(
    draw: Callable[[Callable[[str], str]], Any], path: pathlib.Path
) -> None:
    """Writes a figure for light pages, and one beside it for dark pages.

    Args:
      draw: returns the figure; its argument gives a color as the theme shows it.
      path: of the light one; the other is `STEM-dark.png`.
    """
    for theme, (paper, ink) in _THEMES.items():
        colors = {} if theme == "light" else _BRIGHTER
        drawn = "text.color", "axes.edgecolor", "axes.labelcolor"
        drawn += "xtick.color", "ytick.color"
        filled = "figure.facecolor", "axes.facecolor", "savefig.facecolor"
        settings = dict.fromkeys(drawn, ink) | dict.fromkeys(filled, paper)
        with pyplot().rc_context(settings):
            figure = draw(lambda color, colors=colors: colors.get(color, color))
            suffix = "" if theme == "light" else f"-{theme}"
            # The bytes depend on the content only.
            figure.savefig(
                path.with_stem(path.stem + suffix),
                dpi=110, bbox_inches="tight", metadata={"Software": None},
            )  # fmt: skip
            pyplot().close(figure)
