"""Latency and throughput over load: as PNG (matplotlib) or as one HTML file with its own SVG."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from text_generation_launcher.benchmark.report import PERCENTILES, Summary

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 30, 45
COLORS = ("#1f6feb", "#d9822b", "#b3261e")
NUM_TICKS = 5


class PlotError(Exception):
    """A plot that cannot be drawn; the text says what to do."""


@dataclass(frozen=True)
class Panel:
    """One diagram: a few curves over the same loads."""

    title: str
    unit: str
    loads: list[float]
    curves: dict[str, list[float]]


def check_plot(path: Path) -> None:
    """Raise PlotError before the load is run, not after."""
    if path.suffix not in (".png", ".html"):
        raise PlotError(f"--plot {path}: the name must end in .png or .html")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise PlotError(
                f"--plot {path}: PNG files are drawn by matplotlib: pip install 'text-generation[benchmark]'; "
                "a name that ends in .html needs nothing"
            ) from None


def draw(path: Path, summaries: Sequence[Summary], knee: Summary | None) -> None:
    """Draw a sweep."""
    panels = make_panels(summaries)
    load_name = "requests a second" if summaries[0].pace.rate is not None else "concurrent requests"
    knee_load = None if knee is None else knee.pace.load
    if path.suffix == ".png":
        _draw_png(path, panels, load_name, knee_load)
    else:
        path.write_text(render_html(summaries[0].name, panels, load_name, knee_load), encoding="utf-8")


def make_panels(summaries: Sequence[Summary]) -> list[Panel]:
    """What is drawn: TTFT, TPOT and ITL, and throughput."""
    loads = [float(summary.pace.load or 0) for summary in summaries]
    panels = []
    for kind in ("ttft", "tpot", "itl"):
        curves = {f"p{p}": [summary.latencies_ms[kind][p] for summary in summaries] for p in PERCENTILES}
        panels.append(Panel(kind.upper(), "ms", loads, curves))
    throughput = [summary.output_tokens_per_s for summary in summaries]
    return [*panels, Panel("Throughput", "tokens/s", loads, {"output": throughput})]


def _draw_png(path: Path, panels: list[Panel], load_name: str, knee_load: float | None) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels)), panels, strict=True):
        for (name, values), color in zip(panel.curves.items(), COLORS, strict=False):
            axes.plot(panel.loads, values, marker="o", label=name, color=color)
        if knee_load is not None:
            axes.axvline(knee_load, linestyle="--", color="gray", label="knee")
        axes.set(title=panel.title, ylabel=panel.unit, xlabel=load_name, xscale="log", ylim=(0, None))
        axes.set_xticks(panel.loads, [f"{load:g}" for load in panel.loads])
        axes.legend()
    figure.savefig(path)


def render_html(title: str, panels: list[Panel], load_name: str, knee_load: float | None) -> str:
    """One page that needs nothing else."""
    drawings = "\n".join(_svg(panel, load_name, knee_load) for panel in panels)
    title = html.escape(title)
    style = "body{font:14px sans-serif;margin:2em} svg{display:block;margin-bottom:1em}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head>\n<body><h1>{title}</h1>\n{drawings}\n</body></html>\n"
    )


class _Scale:
    """From values to places in the drawing: loads by their logarithm, latencies from 0."""

    def __init__(self, panel: Panel) -> None:
        values = [value for curve in panel.curves.values() for value in curve if math.isfinite(value)]
        self.highest = max(values, default=0.0) or 1.0
        self._low = math.log(min(panel.loads))
        self._span = math.log(max(panel.loads)) - self._low or 1.0

    def x(self, load: float) -> float:
        return LEFT + (math.log(load) - self._low) / self._span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.highest * (HEIGHT - TOP - BOTTOM)


def _svg(panel: Panel, load_name: str, knee_load: float | None) -> str:
    scale = _Scale(panel)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-size="12">',
        _text(LEFT, TOP - 12, f"{panel.title}, {panel.unit}", "start"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, load_name),
    ]
    for index in range(NUM_TICKS + 1):
        value = scale.highest * index / NUM_TICKS
        parts.append(_line(LEFT, scale.y(value), WIDTH - RIGHT, scale.y(value), "#ddd"))
        parts.append(_text(LEFT - 8, scale.y(value) + 4, f"{value:.4g}", "end"))
    parts += [_text(scale.x(load), HEIGHT - BOTTOM + 16, f"{load:g}") for load in panel.loads]
    if knee_load is not None:
        parts.append(
            _line(scale.x(knee_load), TOP, scale.x(knee_load), HEIGHT - BOTTOM, "#888", ' stroke-dasharray="5"')
        )
        parts.append(_text(scale.x(knee_load), TOP - 2, "knee"))
    for index, (name, values) in enumerate(panel.curves.items()):
        parts += _curve(scale, panel.loads, values, COLORS[index])
        parts.append(_text(WIDTH - RIGHT - 60 * index, TOP - 12, name, "end", COLORS[index]))
    return "".join([*parts, "</svg>"])


def _curve(scale: _Scale, loads: list[float], values: list[float], color: str) -> list[str]:
    places = [(scale.x(load), scale.y(v)) for load, v in zip(loads, values, strict=True) if math.isfinite(v)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
    return [f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>', *dots]


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", color: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{html.escape(text)}</text>'
