"""The roofline as a drawing: operations a second over operations a byte, both on logarithmic axes, as plain SVG."""

from html import escape
from math import ceil, floor, inf, log10
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaloom.runtime.roofline import Roofline, Row

WIDTH, HEIGHT = 860, 560
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 60, 60
STYLE = """
  svg { font: 12px system-ui, sans-serif; --ink: #1f2328; --faint: #d0d7de; --roof: #8250df; --paper: #ffffff; }
  @media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --faint: #30363d; --roof: #bc8cff; --paper: #0d1117; } }
  text { fill: var(--ink); } .grid { stroke: var(--faint); } .roof { stroke: var(--roof); stroke-width: 2; fill: none; }
  .paper { fill: var(--paper); } .title { font-size: 15px; font-weight: 600; } circle { stroke-width: 2; fill-opacity: 0.55; }
"""
COLOURS = ("#0969da", "#1a7f37", "#bf8700", "#cf222e", "#8250df", "#0550ae", "#bf3989", "#57606a")


def plot(found: "Roofline") -> str:
    """One dot an op of a body: at its measured speed where there is one, otherwise hollow on the roof. Ops without operations have
    no place in it. A page may show it on light or dark paper."""
    drawn = [row for row in found.rows if row.work.flops and row.floor and row.work.intensity < inf]
    profile = found.profile
    peaks = {dtype: profile.flops[dtype] for dtype in dict.fromkeys(row.dtype for row in drawn)} or dict(profile.flops)
    ridge = [peak / profile.bandwidth for peak in peaks.values()]
    across = _decades([*(row.work.intensity for row in drawn), *ridge, *(4 * one for one in ridge)])
    up = _decades([*(_speed(row) for row in drawn), *peaks.values()])
    lines = [*_axes(across, up), *_roofs(peaks, profile.bandwidth, across, up)]
    for number, row in enumerate(sorted(drawn, key=lambda row: -(row.seconds or row.floor))):
        lines.append(_dot(row, COLOURS[number % len(COLOURS)], across, up))
    step = found.step
    title = f"{step.kind} of {step.tokens} after {step.context}, batch {step.batch}: {profile.name}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
    paper = f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>'
    shown = f'<text class="title" x="{LEFT}" y="30">{escape(title)}</text>'
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", paper, shown, *lines, "</svg>", ""])


def _speed(row: "Row") -> float:
    return row.work.flops / (row.floor if not row.seconds else row.seconds)


def _decades(values: list[float]) -> tuple[int, int]:
    """The powers of ten around some numbers."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return low, max(high, low + 1)


def _x(value: float, across: tuple[int, int]) -> float:
    return LEFT + (log10(value) - across[0]) / (across[1] - across[0]) * (WIDTH - LEFT - RIGHT)


def _y(value: float, up: tuple[int, int]) -> float:
    return HEIGHT - BOTTOM - (log10(value) - up[0]) / (up[1] - up[0]) * (HEIGHT - TOP - BOTTOM)


def _axes(across: tuple[int, int], up: tuple[int, int]) -> list[str]:
    lines = []
    for power in range(across[0], across[1] + 1):
        x = _x(10.0**power, across)
        lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(up[0], up[1] + 1):
        y = _y(10.0**power, up)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** (power - 9):g}</text>')
    lines.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">FLOP a byte</text>')
    lines.append(f'<text x="{LEFT}" y="{TOP - 12}">GFLOP/s</text>')
    return lines


def _roofs(peaks: dict[str, float], bandwidth: float, across: tuple[int, int], up: tuple[int, int]) -> list[str]:
    lines = []
    for dtype, peak in peaks.items():
        start = max(10.0 ** across[0], 10.0 ** up[0] / bandwidth)
        points = [(start, start * bandwidth), (peak / bandwidth, peak), (10.0 ** across[1], peak)]
        path = " ".join(f"{_x(x, across):.1f},{_y(y, up):.1f}" for x, y in points)
        lines.append(f'<polyline class="roof" points="{path}"/>')
        lines.append(f'<text x="{WIDTH - RIGHT - 4}" y="{_y(peak, up) - 6:.1f}" text-anchor="end">{escape(dtype)}</text>')
    return lines


def _dot(row: "Row", colour: str, across: tuple[int, int], up: tuple[int, int]) -> str:
    x, y = _x(row.work.intensity, across), _y(_speed(row), up)
    fill = colour if row.seconds else "none"
    took = f", took {row.seconds:.3g} s" if row.seconds else ""
    label = escape(f"{row.body}: {row.op}, at least {row.floor:.3g} s{took}")
    return (
        f'<g><title>{label}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{fill}" stroke="{colour}"/>'
        f'<text x="{x + 9:.1f}" y="{y + 4:.1f}">{escape(row.op)}</text></g>'
    )
