"""Generate the Grafana dashboards: writes the JSON files in the folder `dashboards`.

    python deploy/grafana/dashboards.py

Each panel is one call in `service`, `exchanges` or `cache` with title, unit, description and
queries by legend. DATA in a query stands for the market data routes, whose objectives are 99.9 %
without a 5xx and 99 % under 0.5 s. The dashboards show all replicas as one gateway: rates are
summed, shared state shows the worst or the latest value, and values of a single replica are shown
by instance.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    text,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as styles
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

FOLDER = Path(__file__).parent / "dashboards"
# Defined in provisioning/datasources/prometheus.yml.
SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
DATA = 'route=~"/ticker/.*|/tickers|/orderbook/.*|/ohlcv/.*|/trades/.*"'
# Panel widths; the grid has 24 columns.
FULL = 24
HALF = 12
THIRD = 8
SIXTH = 4
STACKED = common.StackingConfig().mode(styles.StackingMode.NORMAL)

Kind = TypeVar("Kind", timeseries.Panel, stat.Panel, bargauge.Panel, statetimeline.Panel)
Queries = Mapping[str, str]  # legend: PromQL
Steps = Mapping[float | None, str]  # lower bound of a threshold: colour; None is the base
Parts = list[dashboard.Row | Builder[models.Panel]]
BLUE: Steps = {None: "blue"}


def panel(
    kind: Kind,
    title: str,
    unit: str,
    description: str,
    queries: Queries,
    *,
    width: int = THIRD,
    steps: Steps = BLUE,
) -> Kind:
    """Fill in a panel of any kind.

    Stat and bar gauge panels query the current value, other panels the time range.
    """
    is_instant = isinstance(kind, stat.Panel | bargauge.Panel)
    for letter, (legend, expression) in zip("ABCD", queries.items(), strict=False):
        query = prometheus.Dataquery().expr(expression.replace("DATA", DATA)).legend_format(legend)
        query.ref_id(letter).datasource(SOURCE)
        kind.with_target(query.instant() if is_instant else query.range())
    thresholds = [models.Threshold(value, colour) for value, colour in steps.items()]
    kind.title(title).description(description).unit(unit).datasource(SOURCE)
    config = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(thresholds)
    kind.thresholds(config)
    return kind.span(width).height(4 if isinstance(kind, stat.Panel) else 8)


def graph(
    title: str,
    unit: str,
    description: str,
    queries: Queries,
    *,
    width: int = THIRD,
    steps: Steps = BLUE,
) -> timeseries.Panel:
    """Return a time series panel that draws each threshold above the base as a line."""
    style = styles.GraphThresholdsStyleMode.OFF
    if len(steps) > 1:
        style = styles.GraphThresholdsStyleMode.LINE
    tooltip = common.VizTooltipOptions().mode(styles.TooltipDisplayMode.MULTI)
    return (
        panel(timeseries.Panel(), title, unit, description, queries, width=width, steps=steps)
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(style))
        .tooltip(tooltip.sort(styles.SortOrder.DESCENDING))
        .legend(common.VizLegendOptions().show_legend(True))
        .fill_opacity(10)
        .axis_soft_min(0)
    )


# `or vector(0)` gives 0 before the first 5xx, when the series does not exist yet. `> 0` and `>= 0`
# omit values without requests; without them the result is NaN.
FAILED = (
    '(sum(rate(virtuoso_http_requests_total{DATA, code=~"5.."}[RANGE])) or vector(0))'
    " / (sum(rate(virtuoso_http_requests_total{DATA}[RANGE])) > 0)"
)
FAST = (
    'sum(rate(virtuoso_http_request_duration_seconds_bucket{DATA, le="0.5"}[RANGE]))'
    " / (sum(rate(virtuoso_http_request_duration_seconds_count{DATA}[RANGE])) > 0)"
)
LATENCY = (
    "histogram_quantile(QUANTILE, sum by (route, le)"
    " (rate(virtuoso_http_request_duration_seconds_bucket"
    '{route!~"/stream/.*"}[$__rate_interval]))) >= 0'
)
AGE = (
    "histogram_quantile(QUANTILE, sum by (route, le)"
    " (rate(virtuoso_cache_served_age_seconds_bucket[$__rate_interval]))) >= 0"
)
STREAM_AGE = (
    "histogram_quantile(QUANTILE, sum by (le)"
    " (rate(virtuoso_stream_event_age_seconds_bucket[$__rate_interval]))) >= 0"
)
LAG = (
    "histogram_quantile(0.99, sum by (exchange, le)"
    " (rate(virtuoso_POINT_lag_seconds_bucket[$__rate_interval]))) >= 0"
)
AGE_OF_ALL = AGE.replace("route, ", "")
ANSWERED: Steps = {None: "red", 0.999: "green"}
UNDER_HALF_A_SECOND: Steps = {None: "red", 0.99: "green"}
BURNING: Steps = {None: "green", 6: "orange", 14.4: "red"}
HITS: Steps = {None: "orange", 0.9: "green"}
STALE: Steps = {None: "green", 0.2: "red"}


def service() -> Parts:
    """Return the panels about service quality for clients, and capacity."""
    return [
        panel(
            stat.Panel(), "Success rate, 30 days", units.PercentUnit,
            "Market data requests of 30 days without a 5xx response. The objective is 99.9 %.",
            {"success": "1 - " + FAILED.replace("RANGE", "30d")}, width=SIXTH, steps=ANSWERED,
        ).decimals(3).no_value("no requests"),
        panel(
            stat.Panel(), "Success rate, 7 days", units.PercentUnit,
            "Market data requests of 7 days without a 5xx response. The objective is 99.9 %.",
            {"success": "1 - " + FAILED.replace("RANGE", "7d")}, width=SIXTH, steps=ANSWERED,
        ).decimals(3).no_value("no requests"),
        panel(
            stat.Panel(), "Under 0.5 s, 30 days", units.PercentUnit,
            "Market data requests of 30 days that took at most 0.5 s. The objective is 99 %.",
            {"fast": FAST.replace("RANGE", "30d")}, width=SIXTH, steps=UNDER_HALF_A_SECOND,
        ).decimals(2).no_value("no requests"),
        panel(
            stat.Panel(), "Under 0.5 s, 7 days", units.PercentUnit,
            "Market data requests of 7 days that took at most 0.5 s. The objective is 99 %.",
            {"fast": FAST.replace("RANGE", "7d")}, width=SIXTH, steps=UNDER_HALF_A_SECOND,
        ).decimals(2).no_value("no requests"),
        panel(
            stat.Panel(), "Error budget left, 30 days", units.PercentUnit,
            "Remaining share of the 0.1 % of requests that may fail in 30 days. Below zero the"
            " objective is missed.",
            {"left": "1 - " + FAILED.replace("RANGE", "30d") + " / 0.001"},
            width=SIXTH, steps={None: "red", 0: "orange", 0.25: "green"},
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Alerts firing", units.Short,
            "Alerts that fire now. The panel Alerts shows which ones. docs/runbook.md has a"
            " section for each alert.",
            {"firing": 'count(ALERTS{alertstate="firing"}) or vector(0)'},
            width=SIXTH, steps={None: "green", 1: "red"},
        ),

        dashboard.Row("Objectives"),
        graph(
            "Burn rate: failed requests", units.Short,
            "Error rate divided by the allowed error rate. At 1 the error budget lasts 30 days. An"
            " alert pages when 1 h and 5 min are above 14.4, or 6 h and 30 min above 6.",
            {
                "5 min": "virtuoso:http_errors:ratio_rate5m / 0.001",
                "30 min": "virtuoso:http_errors:ratio_rate30m / 0.001",
                "1 h": "virtuoso:http_errors:ratio_rate1h / 0.001",
                "6 h": "virtuoso:http_errors:ratio_rate6h / 0.001",
            },
            width=HALF, steps=BURNING,
        ).no_value("no requests"),
        graph(
            "Burn rate: slow requests", units.Short,
            "Rate of slow requests divided by the allowed rate: 1 % may take longer than 0.5 s. An"
            " alert pages when 1 h and 5 min are above 14.4.",
            {
                "5 min": "virtuoso:http_slow:ratio_rate5m / 0.01",
                "30 min": "virtuoso:http_slow:ratio_rate30m / 0.01",
                "1 h": "virtuoso:http_slow:ratio_rate1h / 0.01",
                "6 h": "virtuoso:http_slow:ratio_rate6h / 0.01",
            },
            width=HALF, steps=BURNING,
        ).no_value("no requests"),
        panel(
            statetimeline.Panel(), "Alerts", units.NoUnit,
            "Alerts over time. An alert is pending until its condition has held for its minimum"
            " duration, then it fires.",
            {
                "{{alertname}}":
                "max by (alertname)"
                ' (ALERTS{alertstate="pending"} or 2 * ALERTS{alertstate="firing"})',
            },
            width=FULL,
        ).mappings([models.ValueMap({
            "1": models.ValueMappingResult("pending", "yellow"),
            "2": models.ValueMappingResult("firing", "red"),
        })]).show_value(styles.VisibilityMode.NEVER).no_value("no alerts"),

        dashboard.Row("Traffic"),
        graph(
            "Requests by route", units.RequestsPerSecond, "Responses sent, with any status.",
            {"{{route}}": "sum by (route) (rate(virtuoso_http_requests_total[$__rate_interval]))"},
            width=HALF,
        ).stacking(STACKED),
        graph(
            "Errors by status", units.RequestsPerSecond,
            "Responses with a status of 400 or more. 4xx are errors of the caller; 429 is a client"
            " over its limit. 5xx are errors of the gateway or of exchanges.",
            {
                "{{code}}":
                "sum by (code)"
                ' (rate(virtuoso_http_requests_total{code=~"4..|5.."}[$__rate_interval]))',
            },
            width=HALF,
        ).stacking(STACKED).no_value("no errors"),
        graph(
            "Latency by route, p50", units.Seconds,
            "50 % of the requests of a route are answered within this time. A gap means no"
            " requests.",
            {"{{route}}": LATENCY.replace("QUANTILE", "0.5")},
        ),
        graph(
            "Latency by route, p95", units.Seconds,
            "95 % of the requests of a route are answered within this time. A gap means no"
            " requests.",
            {"{{route}}": LATENCY.replace("QUANTILE", "0.95")},
        ),
        graph(
            "Latency by route, p99", units.Seconds,
            "99 % of the requests of a route are answered within this time. The line is the"
            " objective of 0.5 s.",
            {"{{route}}": LATENCY.replace("QUANTILE", "0.99")}, steps={None: "green", 0.5: "red"},
        ),

        dashboard.Row("Capacity"),
        graph(
            "Requests in progress", units.Short, "Requests in progress, sum of all replicas.",
            {"in progress": "sum(virtuoso_http_requests_in_progress)"},
        ),
        graph(
            "Event loop lag, p99", units.Seconds,
            "Delay of the event loop. Every request waits this long. Above the line the replica is"
            " overloaded.",
            {
                "{{instance}}":
                "histogram_quantile(0.99, sum by (instance, le)"
                " (rate(virtuoso_event_loop_lag_seconds_bucket[$__rate_interval]))) >= 0",
            },
            steps={None: "green", 0.1: "red"},
        ),
        graph(
            "Replicas", units.Short, "Replicas that Prometheus scrapes, and replicas that answer.",
            {"known": 'count(up{job="virtuoso"})', "answering": 'sum(up{job="virtuoso"})'},
        ).no_value("no replicas"),
        graph(
            "Memory", units.BytesIEC,
            "Resident memory of a replica, without the child process that reads market lists. An"
            " alert fires above the line.",
            {"{{instance}}": 'process_resident_memory_bytes{job="virtuoso"}'},
            steps={None: "green", 400e6: "red"},
        ),
        graph(
            "CPU", units.PercentUnit,
            "Share of one core that a replica uses; a replica cannot use more than one core. Add a"
            " replica when the line is reached.",
            {"{{instance}}": 'rate(process_cpu_seconds_total{job="virtuoso"}[$__rate_interval])'},
            steps={None: "green", 0.8: "orange"},
        ),
        graph(
            "Open files", units.Short, "Open file descriptors of a replica, including connections.",
            {"{{instance}}": 'process_open_fds{job="virtuoso"}'},
        ),
        graph(
            "Unexpected errors", units.OpsPerSecond,
            "Unexpected errors of the gateway code in background tasks, by component. The log has"
            " the tracebacks. An alert fires for every error.",
            {
                "{{component}}":
                "sum by (component) (rate(virtuoso_internal_errors_total[$__rate_interval]))",
            },
            width=FULL,
        ).stacking(STACKED).no_value("no errors"),

        dashboard.Row("Streams"),
        graph(
            "Streaming clients", units.Short,
            "Connected clients, sum of all replicas: WebSockets (`ws`) and server-sent events"
            " (`sse`). Each replica accepts at most STREAM_MAX_CLIENTS.",
            {"{{transport}}": "sum by (transport) (virtuoso_stream_subscribers)"},
        ).stacking(STACKED),
        graph(
            "Refused client connections", units.RequestsPerSecond,
            "Refused streaming connections, by the limit that was reached: STREAM_MAX_CLIENTS or"
            " STREAM_MAX_PER_CLIENT.",
            {
                "{{reason}}":
                "sum by (reason) (rate(virtuoso_stream_refused_total[$__rate_interval]))",
            },
        ).stacking(STACKED).no_value("none refused"),
        graph(
            "Updates sent to clients", units.MessagesPerSecond,
            "Snapshots and updates sent, counted once per client.",
            {
                "{{channel}}":
                "sum by (channel) (rate(virtuoso_stream_messages_sent_total[$__rate_interval]))",
            },
        ).stacking(STACKED),
        graph(
            "Latency from exchange message to clients", units.Seconds,
            "Time from receiving an exchange message to sending the update to clients, also"
            " through another replica. A gap means that no streams were watched.",
            {
                "p50": STREAM_AGE.replace("QUANTILE", "0.5"),
                "p99": STREAM_AGE.replace("QUANTILE", "0.99"),
            },
        ),
        graph(
            "Lag behind the exchange, p99", units.Seconds,
            "Time from the exchange's own time until receipt, and until a pushed value is published"
            " to feeds. 0 if the exchange's clock is ahead.",
            {
                "{{exchange}} receipt": LAG.replace("POINT", "receipt"),
                "{{exchange}} delivery": LAG.replace("POINT", "delivery"),
            },
        ),
        graph(
            "Conflated updates", units.MessagesPerSecond,
            "Updates that slow clients did not get because a newer update replaced them.",
            {"replaced": "sum(rate(virtuoso_stream_conflated_total[$__rate_interval]))"},
        ),
        graph(
            "Dropped messages", units.MessagesPerSecond,
            "`slow_client`: clients that read nothing and were disconnected. `implausible`:"
            " exchange messages without a usable price. `bus`: updates that did not reach the"
            " other replicas.",
            {
                "{{reason}}":
                "sum by (reason) (rate(virtuoso_stream_dropped_total[$__rate_interval]))",
            },
        ).stacking(STACKED).no_value("none dropped"),
        panel(
            bargauge.Panel(), "Lease changes", units.Short,
            "How often replicas started (`taken`) or stopped (`lost`) watching a stream for all"
            " replicas, in the selected time range.",
            {
                "{{to}}":
                "round(sum by (to) (increase(virtuoso_stream_lease_changes_total[$__range])))",
            },
        ).min(0).orientation(styles.VizOrientation.HORIZONTAL),

        dashboard.Row("Clients"),
        graph(
            "Requests by client", units.RequestsPerSecond,
            "Requests by the name of the API key. `anonymous`: no keys are configured. `/admin`:"
            " the admin API.",
            {
                "{{client}}":
                "sum by (client)"
                ' (rate(virtuoso_client_requests_total{outcome="admitted"}[$__rate_interval]))',
            },
            width=HALF,
        ).stacking(STACKED),
        graph(
            "Rejected client requests", units.RequestsPerSecond,
            "Requests over the limit of a client, and requests without a valid key (`unknown`) or"
            " admin token (`/admin`).",
            {
                "{{client}}, {{outcome}}":
                "sum by (client, outcome)"
                ' (rate(virtuoso_client_requests_total{outcome!="admitted"}[$__rate_interval]))',
            },
            width=HALF,
        ).stacking(STACKED).no_value("none rejected"),
        panel(
            stat.Panel(), "Time since daily maintenance", units.Seconds,
            "Time since the last successful daily run. An alert fires after two missed runs.",
            {
                "daily":
                "time() - max(max_over_time("
                'virtuoso_maintenance_last_success_timestamp_seconds{task="daily"}[7d]))',
            },
            width=HALF, steps={None: "green", 25 * 3600: "orange", 49 * 3600: "red"},
        ).no_value("never ran"),
        panel(
            stat.Panel(), "Samples per scrape", units.Short,
            "Samples of the replica that exports the most. An alert fires above 5,000, when a"
            " label has too many values.",
            {"samples": 'max(scrape_samples_scraped{job="virtuoso"})'},
            width=HALF, steps={None: "green", 5000: "red"},
        ).no_value("no replicas"),
    ]  # fmt: skip


def exchanges() -> Parts:
    """Return the panels about the state of the exchanges and the use of their budgets."""
    return [
        panel(
            statetimeline.Panel(), "Circuit breakers", units.NoUnit,
            "Worst state of all replicas. Open: no requests go to the exchange. Half-open: the"
            " result of the next call decides.",
            {
                "{{exchange}}":
                "max by (exchange)"
                ' (virtuoso_circuit_state{exchange=~"$exchange", state="half_open"}'
                ' or 2 * virtuoso_circuit_state{exchange=~"$exchange", state="open"})',
            },
            width=FULL,
        ).mappings([models.ValueMap({
            "0": models.ValueMappingResult("closed", "green"),
            "1": models.ValueMappingResult("half-open", "yellow"),
            "2": models.ValueMappingResult("open", "red"),
        })]).show_value(styles.VisibilityMode.NEVER),
        panel(
            stat.Panel(), "Time since last success", units.Seconds,
            "Time since an exchange last answered any replica successfully. Also grows without"
            " requests.",
            {
                "{{exchange}}":
                "time() - max by (exchange)"
                ' (virtuoso_exchange_last_success_timestamp_seconds{exchange=~"$exchange"})',
            },
        ).no_value("no success yet"),
        panel(
            stat.Panel(), "Available markets", units.Short,
            "Markets on the replica with the fewest. 0: the market list is not loaded.",
            {
                "{{exchange}}":
                'min by (exchange) (virtuoso_exchange_markets{exchange=~"$exchange"})',
            },
            steps={None: "red", 1: "green"},
        ),
        panel(
            stat.Panel(), "Budget used now", units.PercentUnit,
            "Share of the allowed request weight in use, highest value of all replicas. At 100 %"
            " no calls are made.",
            {
                "{{exchange}} {{pool}}":
                "max by (exchange, pool)"
                ' (virtuoso_exchange_budget_used_ratio{exchange=~"$exchange"})',
            },
            steps={None: "green", 0.5: "yellow", 0.9: "red"},
        ).decimals(0),

        dashboard.Row("Calls"),
        graph(
            "Calls", units.RequestsPerSecond, "Calls to an exchange, sum of all replicas.",
            {
                "{{exchange}}":
                "sum by (exchange)"
                " (rate(virtuoso_exchange_requests_total"
                '{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ),
        graph(
            "Call duration, p95", units.Seconds,
            "95 % of the calls of the last 5 minutes took at most this long. Calls time out after"
            " EXCHANGE_TIMEOUT_SECONDS.",
            {
                "{{exchange}}":
                'virtuoso:exchange_request_duration_seconds:p95_5m{exchange=~"$exchange"}',
            },
        ).no_value("no calls"),
        graph(
            "Budget used", units.PercentUnit,
            "Share of the allowed request weight in use. Above 50 % refresh-ahead pauses, at 100 %"
            " no calls are made. An alert fires above the line.",
            {
                "{{exchange}} {{pool}}":
                "max by (exchange, pool)"
                ' (virtuoso_exchange_budget_used_ratio{exchange=~"$exchange"})',
            },
            steps={None: "green", 0.9: "red"},
        ).axis_soft_max(1),
        graph(
            "Outcomes: $exchange", units.RequestsPerSecond,
            "Results of the calls. Rejected: the exchange refused the request because of its"
            " parameters, which is not a failure.",
            {
                "{{outcome}}":
                "sum by (outcome)"
                " (rate(virtuoso_exchange_requests_total"
                '{exchange=~"$exchange"}[$__rate_interval]))',
            },
            width=FULL,
        ).stacking(STACKED).repeat("exchange").repeat_direction("h").override_by_name(
            "success",
            [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "green"})],
        ),
        graph(
            "Dropped rows", units.Short,
            "Implausible rows that were left out of answers of an exchange, in each interval.",
            {
                "{{exchange}} {{operation}}":
                "sum by (exchange, operation)"
                ' (increase(virtuoso_rows_dropped_total{exchange=~"$exchange"}[$__rate_interval]))',
                "{{exchange}} trades {{reason}}":
                "sum by (exchange, reason) (increase("
                'virtuoso_trades_dropped_total{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ).no_value("none dropped"),
        graph(
            "Calls in progress", units.Short, "Calls in progress, sum of all replicas.",
            {
                "{{exchange}}":
                'sum by (exchange) (virtuoso_exchange_in_flight{exchange=~"$exchange"})',
            },
        ),
        graph(
            "Calls blocked by a breaker", units.RequestsPerSecond,
            "Calls that were not made because the circuit breaker was open.",
            {
                "{{exchange}}":
                "sum by (exchange)"
                ' (rate(virtuoso_circuit_rejected_total{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ),
        panel(
            bargauge.Panel(), "Breaker state changes", units.Short,
            "How often breakers changed to a state in the selected time range, sum of all"
            " replicas.",
            {
                "{{exchange}} {{to}}":
                "round(sum by (exchange, to)"
                ' (increase(virtuoso_circuit_transitions_total{exchange=~"$exchange"}[$__range])))',
            },
            steps={None: "green", 1: "orange"},
        ).min(0).orientation(styles.VizOrientation.HORIZONTAL),

        dashboard.Row("Streams"),
        graph(
            "Sockets", units.Short,
            "Open WebSocket connections to an exchange, sum of all replicas: one per watched"
            " channel, more on some exchanges.",
            {"{{exchange}}": 'sum by (exchange) (virtuoso_stream_sockets{exchange=~"$exchange"})'},
        ),
        graph(
            "Messages", units.MessagesPerSecond,
            "Messages received from an exchange, sum of all replicas.",
            {
                "{{exchange}} {{channel}}":
                "sum by (exchange, channel)"
                " (rate(virtuoso_stream_messages_received_total"
                '{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ),
        panel(
            bargauge.Panel(), "Reconnects", units.Short,
            "Lost sockets and failed connection attempts in the selected time range, by cause."
            " `silent`: the socket pushed no messages. An alert fires at more than 10 in ten"
            " minutes with the causes closed, lost or junk.",
            {
                "{{exchange}} {{cause}}":
                "round(sum by (exchange, cause)"
                ' (increase(virtuoso_stream_reconnects_total{exchange=~"$exchange"}[$__range])))',
            },
            steps={None: "green", 1: "orange"},
        ).min(0).orientation(styles.VizOrientation.HORIZONTAL),
        graph(
            "Watched streams", units.Short,
            "Streams that a replica watches or receives from other replicas, highest value of all"
            " replicas.",
            {
                "{{exchange}} {{channel}}":
                'max by (exchange, channel) (virtuoso_stream_watched{exchange=~"$exchange"})',
            },
            width=HALF,
        ),
        graph(
            "Stale streams", units.Short,
            "Watched streams without updates from the exchange, highest value of all replicas. The"
            " gateway fetches them by REST. An alert fires when more than half of the watched"
            " streams are stale for 5 minutes.",
            {"{{exchange}}": 'max by (exchange) (virtuoso_stream_stale{exchange=~"$exchange"})'},
            width=HALF, steps={None: "green", 1: "orange"},
        ),

        dashboard.Row("Data age, all exchanges"),
        graph(
            "Age of served data, p50", units.Seconds,
            "50 % of the responses of a route were at most this old. An exchange that is down"
            " shows as old data.",
            {"{{route}}": AGE.replace("QUANTILE", "0.5")}, width=HALF,
        ),
        graph(
            "Age of served data, p95", units.Seconds,
            "95 % of the responses of a route were at most this old. Values older than their TTL"
            " are marked stale.",
            {"{{route}}": AGE.replace("QUANTILE", "0.95")}, width=HALF,
        ),
    ]  # fmt: skip


def cache() -> Parts:
    """Return the panels about the calls that the cache saves and the age of its data."""
    return [
        panel(
            stat.Panel(), "Hit rate, 5 minutes", units.PercentUnit,
            "Values that were fresh in memory or in Redis. Above 90 % under steady use.",
            {"hits": "virtuoso:cache_hits:ratio_rate5m"}, width=SIXTH, steps=HITS,
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Stale, 10 minutes", units.PercentUnit,
            "Values served after their TTL and marked stale. Above 20 % an alert fires: an"
            " exchange fails.",
            {"stale": "virtuoso:cache_stale:ratio_rate10m"}, width=SIXTH, steps=STALE,
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Calls saved, 5 minutes", units.PercentUnit,
            "Values that needed no exchange call: hits, stale values, and values that another call"
            " returned.",
            {
                "saved":
                '1 - sum(rate(virtuoso_cache_requests_total{result="miss"}[5m]))'
                " / (sum(rate(virtuoso_cache_requests_total[5m])) > 0)",
            },
            width=SIXTH, steps=HITS,
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Data age, p95", units.Seconds,
            "95 % of the responses of the last 5 minutes were at most this old.",
            {"age": AGE_OF_ALL.replace("QUANTILE", "0.95").replace("$__rate_interval", "5m")},
            width=SIXTH,
        ).no_value("no requests"),
        panel(
            stat.Panel(), "Entries in memory", units.Short,
            "Entries on the replica with the most. CACHE_MEMORY_SIZE is the limit.",
            {"entries": "max(virtuoso_cache_entries)"}, width=SIXTH,
        ).no_value("no replicas"),
        panel(
            stat.Panel(), "Redis, as seen by replicas", units.NoUnit,
            "Down when at least one replica gets no answer from Redis. That replica caches in"
            " memory only; clients are still served.",
            {"Redis": 'min(virtuoso_cache_tier_up{tier="redis"})'}, width=SIXTH,
        ).mappings([models.ValueMap({
            "0": models.ValueMappingResult("down", "red"),
            "1": models.ValueMappingResult("up", "green"),
        })]).no_value("memory only"),

        dashboard.Row("Results"),
        graph(
            "Cache results", units.PercentUnit,
            "Shares of all requested values. coalesced: result of a call for another request;"
            " negative: a cached refusal; stale_error: a stale value replaced a failed call;"
            " stale_revalidate: a stale value was served during its refresh.",
            {
                "{{result}}":
                "sum by (result) (rate(virtuoso_cache_requests_total[$__rate_interval]))"
                " / ignoring (result) group_left ()"
                " (sum(rate(virtuoso_cache_requests_total[$__rate_interval])) > 0)",
            },
            width=HALF,
        ).stacking(STACKED).fill_opacity(60).min(0).max(1),
        graph(
            "Hit rate", units.PercentUnit,
            "Values of the last 5 minutes that were fresh in memory or in Redis. The line is at 90"
            " %.",
            {"hits": "virtuoso:cache_hits:ratio_rate5m"}, width=HALF, steps=HITS,
        ).min(0).max(1).no_value("no requests"),
        graph(
            "Age of served data", units.Seconds,
            "50 % and 95 % of all responses were at most this old.",
            {
                "p50": AGE_OF_ALL.replace("QUANTILE", "0.5"),
                "p95": AGE_OF_ALL.replace("QUANTILE", "0.95"),
            },
        ),
        graph(
            "Stale share", units.PercentUnit,
            "Values of the last 10 minutes that were served after their TTL and marked stale. An"
            " alert fires above the line.",
            {"stale": "virtuoso:cache_stale:ratio_rate10m"}, steps=STALE,
        ).no_value("no requests"),
        graph(
            "Refresh-ahead", units.CountsPerSecond,
            "Refreshes of frequently requested values before they expire. skipped: the breaker is"
            " open or half of the budget is used.",
            {
                "{{outcome}}":
                "sum by (outcome) (rate(virtuoso_cache_refreshes_total[$__rate_interval]))",
            },
        ),

        dashboard.Row("Tiers"),
        graph(
            "Memory", units.OpsPerSecond, "Operations on the memory caches, sum of all replicas.",
            {
                "{{operation}} {{outcome}}":
                "sum by (operation, outcome)"
                ' (rate(virtuoso_cache_tier_operations_total{tier="memory"}[$__rate_interval]))',
            },
        ),
        graph(
            "Redis", units.OpsPerSecond,
            "Redis operations, sum of all replicas. skipped: Redis failed, and its breaker is"
            " open.",
            {
                "{{operation}} {{outcome}}":
                "sum by (operation, outcome)"
                ' (rate(virtuoso_cache_tier_operations_total{tier="redis"}[$__rate_interval]))',
            },
        ).no_value("memory only"),
        graph(
            "Redis operation duration, p95", units.Seconds,
            "95 % of the operations took at most this long. A gap means no operations of this"
            " kind.",
            {
                "{{operation}}":
                "histogram_quantile(0.95, sum by (operation, le)"
                " (rate(virtuoso_cache_tier_operation_duration_seconds_bucket"
                '{tier="redis"}[$__rate_interval]))) >= 0',
            },
        ).no_value("memory only"),
        graph(
            "Entries in memory, by replica", units.Short,
            "CACHE_MEMORY_SIZE is the limit of each replica.",
            {"{{instance}}": "virtuoso_cache_entries"}, width=HALF,
        ),
        graph(
            "Evictions from memory", units.CountsPerSecond,
            "size: the memory cache is full, CACHE_MEMORY_SIZE may be too small; expired: too old"
            " to be served as stale; cleared: removed by /admin.",
            {
                "{{reason}}":
                "sum by (reason) (rate(virtuoso_cache_evictions_total[$__rate_interval]))",
            },
            width=HALF,
        ),
        graph(
            "Size of the entries in memory, by replica", units.BytesIEC,
            "CACHE_MEMORY_BYTES is the limit of each replica.",
            {"{{instance}}": "virtuoso_cache_bytes"}, width=HALF,
        ),
        graph(
            "Raw requests, by outcome", units.RequestsPerSecond,
            "Answers below /raw: results of the cache; error: an exchange's own error; refused: by"
            " the gateway, in the exchange's format.",
            {
                "{{outcome}}":
                "sum by (outcome) (rate(virtuoso_raw_requests_total[$__rate_interval]))",
            },
            width=HALF,
        ),
        graph(
            "Requested values per call to an exchange", units.Short,
            "Of all endpoints, also /raw, in the last 5 minutes. All calls count, also those for"
            " market lists.",
            {
                "values per call":
                "sum(rate(virtuoso_cache_requests_total[5m]))"
                " / (sum(rate(virtuoso_exchange_requests_total[5m])) > 0)",
            },
        ),

        dashboard.Row("Redis server"),
        graph(
            "Redis memory", units.BytesIEC,
            "Used memory and limit. At the limit Redis evicts the least recently used keys. A"
            " limit of 0 means no limit.",
            {
                "used": 'redis_memory_used_bytes{job="redis"}',
                "limit": 'redis_memory_max_bytes{job="redis"}',
            },
        ).no_value("redis-exporter is down"),
        graph(
            "Keys evicted by Redis", units.CountsPerSecond,
            "0 while Redis has free memory. Evicted values are loaded again. An evicted budget"
            " starts at zero.",
            {"evicted": 'rate(redis_evicted_keys_total{job="redis"}[$__rate_interval])'},
        ).no_value("redis-exporter is down"),
        graph(
            "Connections to Redis", units.Short,
            "Connections of all replicas, and one of the exporter.",
            {"connections": 'redis_connected_clients{job="redis"}'},
        ).no_value("redis-exporter is down"),
    ]  # fmt: skip


def render() -> dict[str, str]:
    """Return the JSON text of every dashboard by file name. The output is deterministic."""
    exchange = (
        dashboard.QueryVariable("exchange")
        .label("Exchange")
        .datasource(SOURCE)
        .query({"query": "label_values(virtuoso_circuit_state, exchange)", "refId": "exchange"})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )
    boards = {
        "service": (dashboard.Dashboard("Virtuoso: Service"), service()),
        "exchanges": (
            dashboard.Dashboard("Virtuoso: Exchanges").with_variable(exchange),
            exchanges(),
        ),
        "cache": (dashboard.Dashboard("Virtuoso: Cache"), cache()),
    }
    links = (
        dashboard.DashboardLink("Virtuoso")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["virtuoso"])
    )
    note = "`docs/runbook.md` in the repository explains each alert and what to do about it."
    files = {}
    for name, (board, parts) in boards.items():
        for part in parts:
            if isinstance(part, dashboard.Row):
                board.with_row(part)
            else:
                board.with_panel(part)
        board.with_panel(text.Panel().content(note).transparent(True).span(FULL).height(2))
        board.uid(f"virtuoso-{name}").tags(["virtuoso"]).link(links.keep_time(True)).readonly()
        board.time("now-1h", "now").refresh("10s").tooltip(models.DashboardCursorSync.CROSSHAIR)
        model = board.build()
        for number, built_panel in enumerate(model.panels or [], start=1):
            built_panel.id_val = number
        files[f"{name}.json"] = JSONEncoder(indent=2, sort_keys=True).encode(model) + "\n"
    return files


if __name__ == "__main__":
    for file, content in render().items():
        (FOLDER / file).write_text(content)
