"""The report's charts as SVG, drawn by matplotlib: the same numbers give the same bytes, and nothing is fetched."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from vqa_embeddings.store.heartbeat import Heartbeat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people who see few colours, and in print: by whether answer and truth agree (no truth: None).
COLOURS = {True: "#0072b2", False: "#d55e00", None: "#999999"}
LINES = ("#009e73", "#0072b2", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # one for each vector
MARKERS = {True: "o", False: "^", None: "s"}
BINS = 60  # of the time that a launch took


def draw_states(projected: tuple[np.ndarray, tuple[float, float]], agreement: Sequence[bool | None], title: str) -> str:
    """A map of the states of rows: what `project` gives, and whether each row's answer agrees with its truth."""
    points, share = projected
    figure, axes = _figure(2.3, 2.1)
    flags = np.array([{True: 1, False: 0, None: -1}[one] for one in agreement])
    for value, number in ((None, -1), (False, 0), (True, 1)):
        chosen = points[flags == number]
        if len(chosen):
            axes.scatter(
                chosen[:, 0], chosen[:, 1], s=9, c=COLOURS[value], marker=MARKERS[value], alpha=0.6, linewidths=0
            )
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(f"{share[0]:.0%} of the variance", fontsize=7)
    axes.set_ylabel(f"{share[1]:.0%}", fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])
    return _to_svg(figure)


def draw_norms(layers: Sequence[int], norms: dict[str, np.ndarray]) -> str:
    """Norms by layer: the median of the rows, and the band in which nine tenths of them lie.

    Args:
        norms: float `[layers, n]` by name.
    """
    figure, axes = _figure(6.4, 2.8)
    for (name, values), colour in zip(norms.items(), cycle(LINES), strict=False):
        low, middle, high = np.percentile(values, [5, 50, 95], axis=1)
        axes.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(layers, middle, "o-", color=colour, label=name, markersize=4)
    axes.set_xticks(layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("norm")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _to_svg(figure)


def draw_throughput(heartbeats: Sequence[Heartbeat]) -> str:
    """Rows a second over time: each rank as a thin line, and above them their sum."""
    figure, (together, each) = _figures(6.4, 3.6)
    begin = min(float(rank.times[0]) for rank in heartbeats)
    end = max(float(rank.times[-1]) for rank in heartbeats)
    edges = np.linspace(0, max(end - begin, 1.0), BINS + 1)
    unit, seconds = ("hours", 3600) if edges[-1] > 7200 else ("minutes", 60) if edges[-1] > 120 else ("seconds", 1)
    middles = (edges[1:] + edges[:-1]) / 2 / seconds
    rates = [np.diff(np.interp(edges + begin, rank.times, rank.done)) / np.diff(edges) for rank in heartbeats]
    together.plot(middles, np.sum(rates, axis=0), color="#0072b2")
    for rate in rates:
        each.plot(middles, rate, color="#666666", linewidth=0.7, alpha=0.6)
    together.set_ylabel("rows/s, all")
    each.set_ylabel("rows/s, each rank")
    each.set_xlabel(unit)
    for axes in (together, each):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    return _to_svg(figure)


def project(states: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The first two principal components of states, float `[n, size]`, and the share of the variance along each.

    States that are all the same are all at 0.
    """
    centred = states.astype(np.float64) - states.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred @ centred.T)  # of n by n: the rows are fewer than the dimensions
    total = float(values.clip(0).sum())
    if total <= 1e-12 * max(1.0, float(np.square(states, dtype=np.float64).sum())) or len(states) < 3:
        return np.zeros((len(states), 2)), (0.0, 0.0)
    largest = values[:-3:-1].clip(0)
    points = vectors[:, :-3:-1] * np.sqrt(largest)
    points *= np.where(points[np.abs(points).argmax(axis=0), (0, 1)] < 0, -1, 1)  # the sign is arbitrary
    return points, (float(largest[0] / total), float(largest[1] / total))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _new_figure(width, height)
    return figure, figure.subplots()


def _figures(width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = _new_figure(width, height)
    return figure, figure.subplots(2, sharex=True)


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot, which looks for a screen

    return Figure(figsize=(width, height), layout="constrained")


def _to_svg(figure: Figure) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "vqa_embeddings", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
