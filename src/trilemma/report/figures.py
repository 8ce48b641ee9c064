"""The figures, drawn by plotly: the only module that knows it.

A figure leaves here as JSON; the page draws it offline with the library that `library()` returns. Colours are
those of Okabe and Ito (2008), which colour-blind readers can tell apart, and every series also has its own
marker. Ink and rules are coloured by the page's stylesheet, so that light, dark and print all read well.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from trilemma.report import numbers
from trilemma.report.configurations import UNCOMPRESSED, Headline, Row
from trilemma.report.markup import clean
from trilemma.results import Results

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#A6761D")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "triangle-down", "cross", "pentagon")
_DASHES = ("solid", "dot", "dashdot", "longdash")
_RED = "#C0392B"


class Figure(NamedTuple):
    """One drawing.

    Attributes:
        name: Its id on the page.
        alt: What it shows, for who cannot see it.
        json: Data and layout, for plotly.
        height: In CSS pixels.
    """

    name: str
    alt: str
    json: str
    height: int


def library() -> str:
    """Returns plotly's JavaScript, for the page to hold."""
    return get_plotlyjs()


def robustness_figure(rows: Sequence[Row], evaluation: str, index: int) -> Figure:
    """Returns robust accuracy against radius under one evaluation, the clean accuracy at radius 0."""
    figure = go.Figure()
    style = _Style(rows)
    for row in rows:
        attacked = sorted((a for a in row.attacked if a.evaluation == evaluation), key=lambda a: a.radius)
        known = [(a.radius, a.robust) for a in attacked if a.robust.value is not None]
        if not known:
            continue
        clean_accuracy = row.metric("accuracy")
        points = [(0.0, clean_accuracy), *known] if clean_accuracy.value is not None else known
        figure.add_scatter(
            x=[255 * radius for radius, _ in points],
            y=[estimate.value for _, estimate in points],
            error_y=_bars([estimate for _, estimate in points]),
            customdata=[numbers.metric_estimate("robust_accuracy", estimate) for _, estimate in points],
            hovertemplate="%{customdata}<br>radius %{x:.3g}/255<extra>" + _text(row.title) + "</extra>",
            **style.of(row),
        )
    majority = next((row.majority for row in rows if row.majority is not None), None)
    if majority is not None:
        largest = max((255 * a.radius for row in rows for a in row.attacked if a.evaluation == evaluation), default=0)
        figure.add_scatter(
            x=[0, largest],
            y=[majority, majority],
            mode="lines",
            line={"dash": "dash", "color": _RED, "width": 1.5},
            name=f"always the most frequent answer ({numbers.percent(majority)})",
            hoverinfo="skip",
        )
    figure.update_xaxes(title="radius, in steps of 1/255", rangemode="tozero")
    figure.update_yaxes(title="robust accuracy", tickformat=".0%", range=[-0.02, 1.02])
    alt = f"Lines of robust accuracy against radius under {evaluation}; the numbers are in the table below."
    return _finished(figure, f"robustness-{index}", alt, len(style.configurations) + 1)


def size_figure(rows: Sequence[Row], by: Headline) -> Figure:
    """Returns utility against file size, one mark per row."""
    figure = go.Figure()
    style = _Style(rows)
    for row in rows:
        utility, size, latency = row.metric(by.utility), row.file_bytes, row.latency_1
        if utility.value is None or size.value is None:
            continue
        hover = [numbers.metric_estimate(by.utility, utility), numbers.byte_size(size.value)]
        if latency.value is not None:
            hover.append(f"{numbers.duration(latency.value)} for one image")
        figure.add_scatter(
            x=[size.value],
            y=[utility.value],
            error_y=_bars([utility]),
            customdata=["<br>".join(hover)],
            hovertemplate="%{customdata}<extra>" + _text(row.title) + "</extra>",
            **style.of(row, mode="markers", hollow=row.compression != UNCOMPRESSED),
        )
    figure.update_xaxes(title="file size (filled: fp32, hollow: compressed)", ticksuffix="B", rangemode="tozero")
    figure.update_yaxes(title=numbers.metric_title(by.utility))
    alt = f"{numbers.metric_title(by.utility)} against file size; the numbers are in the table of configurations."
    return _finished(figure, "size", alt, len(style.configurations))


def training_figure(results: Results) -> Figure:
    """Returns validation accuracy against round, one line per training, one colour per configuration."""
    figure = go.Figure()
    labels = list(dict.fromkeys(run.configuration for run in results.runs))
    named = set()
    for run in results.runs:
        points = [(h["round"], h["val_accuracy"]) for h in run.history if h.get("val_accuracy") is not None]
        if not points:
            continue
        index = labels.index(run.configuration)
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            name=_text(run.configuration),
            legendgroup=str(index),
            showlegend=run.configuration not in named,
            mode="lines+markers",
            line={"color": _COLOURS[index % len(_COLOURS)], "width": 1.5, "dash": _DASHES[index // len(_COLOURS) % 4]},
            marker={"symbol": _MARKERS[index % len(_MARKERS)], "size": 6},
            hovertemplate="round %{x}: %{y:.1%}<extra>" + _text(f"{run.configuration}, seed {run.seed}") + "</extra>",
        )
        named.add(run.configuration)
    figure.update_xaxes(title="round")
    figure.update_yaxes(title="validation accuracy", tickformat=".0%")
    alt = "Lines of validation accuracy against round; the last values are in the table below."
    return _finished(figure, "training", alt, len(labels))


class _Style:
    """One colour, marker and legend entry per configuration, one dash per compression."""

    def __init__(self, rows: Sequence[Row]):
        self.configurations = list(dict.fromkeys(row.configuration for row in rows))
        self.compressions = list(dict.fromkeys(row.compression for row in rows))
        self.named: set[str] = set()

    def of(self, row: Row, mode: str = "lines+markers", hollow: bool = False) -> dict:
        index, dash = self.configurations.index(row.configuration), self.compressions.index(row.compression)
        symbol = _MARKERS[index % len(_MARKERS)]
        colour = _COLOURS[index % len(_COLOURS)]
        first = row.configuration not in self.named
        self.named.add(row.configuration)
        return {
            "name": _text(row.configuration),
            "legendgroup": str(index),
            "showlegend": first,
            "mode": mode,
            "line": {"color": colour, "width": 2, "dash": _DASHES[dash % len(_DASHES)]},
            "marker": {
                "symbol": f"{symbol}-open" if hollow else symbol,
                "size": 9 if mode == "lines+markers" else 12,
                "color": colour,
                "line": {"width": 2 if hollow else 0, "color": colour},
            },
        }


def _bars(estimates: Sequence) -> dict:
    up = [e.high - e.value if e.high is not None and e.value is not None else 0 for e in estimates]
    down = [e.value - e.low if e.low is not None and e.value is not None else 0 for e in estimates]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}


def _finished(figure: go.Figure, name: str, alt: str, num_series: int) -> Figure:
    legend_rows = -(-num_series // 2)
    height = 400 + 25 * legend_rows
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "inherit", "size": 13},
        margin={"l": 62, "r": 14, "t": 12, "b": 50},
        height=height,
        hovermode="closest",
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "entrywidth": 0.48,
                "entrywidthmode": "fraction"},
    )  # fmt: skip
    figure.update_xaxes(zeroline=False, showline=True, ticks="outside", automargin=True)
    figure.update_yaxes(zeroline=False, showline=False)
    return Figure(f"figure-{name}", alt, figure.to_json() or "{}", height)


def _text(text: str) -> str:
    """Returns text for plotly, which reads a little markup and its entities: none of a study's may get through."""
    return html.escape(clean(text), quote=False).replace("%{", "%\u200b{")
