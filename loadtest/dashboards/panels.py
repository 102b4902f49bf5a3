"""Panels and dashboards, as these are made of them: a thin layer over Grafana's own library, which knows the format."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Panel,
    VariableOption,
    VariableRefresh,
)

TAG = "whisper-serve"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH, HEIGHT = 8, 7
"""Of a panel; a dashboard is 24 wide."""

STAT_WIDTH, STAT_HEIGHT = 4, 4

SHARE, SECONDS, COUNT, RATE = "percentunit", "s", "short", "suffix:/s"


class Query(NamedTuple):
    """expr: PromQL, with Grafana's variables in it. legend: with labels in double braces."""

    expr: str
    legend: str


def of(metric: str, matchers: str = "") -> str:
    """A metric's selector, of the releases chosen in the dashboard. matchers: more of them, as in PromQL."""
    chosen = 'namespace=~"$namespace",whisper_release=~"$release"'
    return f"{metric}{{{chosen},{matchers}}}" if matchers else f"{metric}{{{chosen}}}"


def graph(title: str, unit: str, help: str, *queries: Query, most: float | None = None) -> timeseries.Panel:
    """Lines over time. most: the axis' end, where there is one, as for a share."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(help)
        .unit(unit)
        .min(0)
        .span(WIDTH)
        .height(HEIGHT)
        .datasource(SOURCE)
        .draw_style(GraphDrawStyle.LINE)
        .fill_opacity(8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(common_builders.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .targets(_targets(queries))
    )
    return panel if most is None else panel.max(most)


def number(title: str, unit: str, help: str, query: Query) -> stat.Panel:
    """The value now, large, with its course behind it."""
    return (
        stat.Panel()
        .title(title)
        .description(help)
        .unit(unit)
        .span(STAT_WIDTH)
        .height(STAT_HEIGHT)
        .datasource(SOURCE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .targets(_targets([query]))
    )


def _targets(queries: Sequence[Query]) -> list[Builder[Dataquery]]:
    return [
        prometheus.Dataquery().datasource(SOURCE).expr(query.expr).legend_format(query.legend).range().ref_id(letter)
        for letter, query in zip(string.ascii_uppercase, queries, strict=False)
    ]


class Row(NamedTuple):
    title: str
    panels: Sequence[Builder[Panel]]


def dashboard(uid: str, title: str, help: str, rows: Sequence[Row]) -> str:
    """A dashboard as JSON. Its variables: where Prometheus is, and which namespaces and releases are looked at; the
    links lead to the other dashboards."""
    board = (
        builders.Dashboard(title)
        .uid(uid)
        .description(help)
        .tags([TAG])
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .link(
            builders.DashboardLink("whisper-serve")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .keep_time(True)
            .include_vars(True)
        )
        .with_variable(builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_choice("namespace", "Namespace", "label_values(ray_whisper_stage_busy, namespace)"))
        .with_variable(
            _choice(
                "release",
                "Release",
                'label_values(ray_whisper_stage_busy{namespace=~"$namespace"}, whisper_release)',
            )
        )
    )
    id = 0
    for row in rows:
        id += 1
        board.with_row(builders.Row(row.title).id(id))
        for panel in row.panels:
            id += 1
            board.with_panel(_numbered(panel, id))
    return json.dumps(json.loads(JSONEncoder().encode(board.build())), indent=2, sort_keys=True) + "\n"


def _choice(name: str, label: str, query: str) -> builders.QueryVariable:
    """Some of a label's values, or all. Outside of Kubernetes there is no such label, which all matches."""
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


class _numbered(Builder[Panel]):
    """A panel with an id of its own, by which links name it."""

    def __init__(self, panel: Builder[Panel], id: int):
        self._panel, self._id = panel, id

    def build(self) -> Panel:
        built = self._panel.build()
        built.id_val = self._id
        return built
