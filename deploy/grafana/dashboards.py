"""The dashboards of Grafana: this script writes the JSON files in `dashboards`, beside it.

    python deploy/grafana/dashboards.py

A panel is one call in `service`, `exchanges` or `cache`: title, unit, what it tells, and its queries by the legend of
their series. DATA in a query stands for the market data routes, whose objectives are 99.9 % without a 5xx and 99 %
under 0.5 s. Several replicas are one gateway here: rates are summed, of a state they share the worst or the latest is
shown, and what each has for itself is shown by instance.
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
SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")  # of provisioning/datasources/prometheus.yml
DATA = 'route=~"/ticker/.*|/tickers|/orderbook/.*|/ohlcv/.*|/trades/.*"'
FULL, HALF, THIRD, SIXTH = 24, 12, 8, 4  # widths; the grid has 24 columns
STACKED = common.StackingConfig().mode(styles.StackingMode.NORMAL)

Kind = TypeVar("Kind", timeseries.Panel, stat.Panel, bargauge.Panel, statetimeline.Panel)
Queries = Mapping[str, str]  # legend: PromQL
Steps = Mapping[float | None, str]  # from this value on: this colour; None is the bottom
Parts = list[dashboard.Row | Builder[models.Panel]]
BLUE: Steps = {None: "blue"}


def panel(
    kind: Kind, title: str, unit: str, tells: str, queries: Queries, *, width: int = THIRD, steps: Steps = BLUE
) -> Kind:
    """Fill a panel of any kind. Numbers and bars show this moment, the others the time range."""
    moment = isinstance(kind, stat.Panel | bargauge.Panel)
    for letter, (legend, expression) in zip("ABCD", queries.items(), strict=False):
        query = prometheus.Dataquery().expr(expression.replace("DATA", DATA)).legend_format(legend)
        query.ref_id(letter).datasource(SOURCE)
        kind.with_target(query.instant() if moment else query.range())
    thresholds = [models.Threshold(value, colour) for value, colour in steps.items()]
    kind.title(title).description(tells).unit(unit).datasource(SOURCE)
    kind.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(thresholds))
    return kind.span(width).height(4 if isinstance(kind, stat.Panel) else 8)


def graph(
    title: str, unit: str, tells: str, queries: Queries, *, width: int = THIRD, steps: Steps = BLUE
) -> timeseries.Panel:
    """Draw series over time, and the steps above the bottom as lines."""
    drawn = styles.GraphThresholdsStyleMode.LINE if len(steps) > 1 else styles.GraphThresholdsStyleMode.OFF
    return (
        panel(timeseries.Panel(), title, unit, tells, queries, width=width, steps=steps)
        .thresholds_style(common.GraphThresholdsStyleConfig().mode(drawn))
        .tooltip(common.VizTooltipOptions().mode(styles.TooltipDisplayMode.MULTI).sort(styles.SortOrder.DESCENDING))
        .legend(common.VizLegendOptions().show_legend(True))
        .fill_opacity(10)
        .axis_soft_min(0)
    )


# `or vector(0)`: a 5xx that never happened has no series. `> 0`, `>= 0`: where nobody asked there is nothing, not NaN.
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
    ' (rate(virtuoso_http_request_duration_seconds_bucket{route!~"/stream/.*"}[$__rate_interval]))) >= 0'
)
AGE = (
    "histogram_quantile(QUANTILE, sum by (route, le)"
    " (rate(virtuoso_cache_served_age_seconds_bucket[$__rate_interval]))) >= 0"
)
STREAM_AGE = (
    "histogram_quantile(QUANTILE, sum by (le) (rate(virtuoso_stream_event_age_seconds_bucket[$__rate_interval]))) >= 0"
)
AGE_OF_ALL = AGE.replace("route, ", "")
ANSWERED: Steps = {None: "red", 0.999: "green"}
UNDER_HALF_A_SECOND: Steps = {None: "red", 0.99: "green"}
BURNING: Steps = {None: "green", 6: "orange", 14.4: "red"}
HITS: Steps = {None: "orange", 0.9: "green"}
STALE: Steps = {None: "green", 0.2: "red"}


def service() -> Parts:
    """Is it well, for those who use it, and does it have room?"""
    return [
        panel(
            stat.Panel(), "Answered, 30 days", units.PercentUnit,
            "Market data requests of 30 days that did not end in a 5xx. The objective is 99.9 %.",
            {"answered": "1 - " + FAILED.replace("RANGE", "30d")}, width=SIXTH, steps=ANSWERED,
        ).decimals(3).no_value("no requests"),
        panel(
            stat.Panel(), "Answered, 7 days", units.PercentUnit,
            "Market data requests of 7 days that did not end in a 5xx. The objective is 99.9 %.",
            {"answered": "1 - " + FAILED.replace("RANGE", "7d")}, width=SIXTH, steps=ANSWERED,
        ).decimals(3).no_value("no requests"),
        panel(
            stat.Panel(), "Under 0.5 s, 30 days", units.PercentUnit,
            "Market data requests of 30 days that took at most half a second. The objective is 99 %.",
            {"fast": FAST.replace("RANGE", "30d")}, width=SIXTH, steps=UNDER_HALF_A_SECOND,
        ).decimals(2).no_value("no requests"),
        panel(
            stat.Panel(), "Under 0.5 s, 7 days", units.PercentUnit,
            "Market data requests of 7 days that took at most half a second. The objective is 99 %.",
            {"fast": FAST.replace("RANGE", "7d")}, width=SIXTH, steps=UNDER_HALF_A_SECOND,
        ).decimals(2).no_value("no requests"),
        panel(
            stat.Panel(), "Error budget left, 30 days", units.PercentUnit,
            "What is left of the 0.1 % of requests that may fail in 30 days. Below zero the objective is missed.",
            {"left": "1 - " + FAILED.replace("RANGE", "30d") + " / 0.001"},
            width=SIXTH, steps={None: "red", 0: "orange", 0.25: "green"},
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Alerts firing", units.Short,
            "Alerts that fire now. Further down is which ones; docs/runbook.md has a section for each.",
            {"firing": 'count(ALERTS{alertstate="firing"}) or vector(0)'}, width=SIXTH, steps={None: "green", 1: "red"},
        ),

        dashboard.Row("Objectives"),
        graph(
            "Burn rate: failed requests", units.Short,
            "How many times faster than allowed the error budget goes; at 1 it lasts its 30 days. Somebody is called"
            " when 1 h and 5 min are above 14.4, or 6 h and 30 min above 6.",
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
            "The same for the 1 % of requests that may take longer than 0.5 s. Somebody is called when 1 h and 5 min"
            " are above 14.4.",
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
            "Alerts whose condition held, as time goes by: pending until it has held for long enough, then firing.",
            {
                "{{alertname}}":
                'max by (alertname) (ALERTS{alertstate="pending"} or 2 * ALERTS{alertstate="firing"})',
            },
            width=FULL,
        ).mappings([models.ValueMap({
            "1": models.ValueMappingResult("pending", "yellow"),
            "2": models.ValueMappingResult("firing", "red"),
        })]).show_value(styles.VisibilityMode.NEVER).no_value("no alert"),

        dashboard.Row("Traffic"),
        graph(
            "Requests by route", units.RequestsPerSecond, "Answers sent, whatever their status.",
            {"{{route}}": "sum by (route) (rate(virtuoso_http_requests_total[$__rate_interval]))"}, width=HALF,
        ).stacking(STACKED),
        graph(
            "Errors by status", units.RequestsPerSecond,
            "Answers with a status of 400 or more. 4xx are the caller's; 429 is a client over its limit. 5xx are ours.",
            {"{{code}}": 'sum by (code) (rate(virtuoso_http_requests_total{code=~"4..|5.."}[$__rate_interval]))'},
            width=HALF,
        ).stacking(STACKED).no_value("no errors"),
        graph(
            "Latency by route, p50", units.Seconds,
            "Half of the requests of a route are answered within this time. A gap: nobody asked.",
            {"{{route}}": LATENCY.replace("QUANTILE", "0.5")},
        ),
        graph(
            "Latency by route, p95", units.Seconds,
            "95 of 100 requests of a route are answered within this time. A gap: nobody asked.",
            {"{{route}}": LATENCY.replace("QUANTILE", "0.95")},
        ),
        graph(
            "Latency by route, p99", units.Seconds,
            "99 of 100 requests of a route are answered within this time. The line is the 0.5 s of the objective.",
            {"{{route}}": LATENCY.replace("QUANTILE", "0.99")}, steps={None: "green", 0.5: "red"},
        ),

        dashboard.Row("Room"),
        graph(
            "Requests under way", units.Short, "Requests being answered at a scrape, all replicas together.",
            {"under way": "sum(virtuoso_http_requests_in_progress)"},
        ),
        graph(
            "Event loop lag, p99", units.Seconds,
            "How late the event loop wakes up; every request waits as long. Above the line the replica is too busy.",
            {
                "{{instance}}":
                "histogram_quantile(0.99, sum by (instance, le)"
                " (rate(virtuoso_event_loop_lag_seconds_bucket[$__rate_interval]))) >= 0",
            },
            steps={None: "green", 0.1: "red"},
        ),
        graph(
            "Replicas", units.Short, "Replicas that Prometheus knows of, and those of them that answer it.",
            {"known": 'count(up{job="virtuoso"})', "answering": 'sum(up{job="virtuoso"})'},
        ).no_value("no replica"),
        graph(
            "Memory", units.BytesIEC,
            "Resident memory of a replica, without the child that reads market lists. An alert fires above the line.",
            {"{{instance}}": 'process_resident_memory_bytes{job="virtuoso"}'}, steps={None: "green", 400e6: "red"},
        ),
        graph(
            "CPU", units.PercentUnit,
            "Share of one core that a replica uses; it cannot use two. At the line it is time for another replica.",
            {"{{instance}}": 'rate(process_cpu_seconds_total{job="virtuoso"}[$__rate_interval])'},
            steps={None: "green", 0.8: "orange"},
        ),
        graph(
            "Open files", units.Short, "File descriptors a replica holds, connections included.",
            {"{{instance}}": 'process_open_fds{job="virtuoso"}'},
        ),
        graph(
            "Unexpected errors", units.OpsPerSecond,
            "Errors of the gateway's own code in work beside requests, by component. The log has their tracebacks."
            " An alert fires for any.",
            {"{{component}}": "sum by (component) (rate(virtuoso_internal_errors_total[$__rate_interval]))"},
            width=FULL,
        ).stacking(STACKED).no_value("no errors"),

        dashboard.Row("Streams"),
        graph(
            "Clients of streams", units.Short,
            "Connected now, all replicas together: WebSockets (`ws`) and server-sent events (`sse`). Each replica takes"
            " STREAM_MAX_CLIENTS.",
            {"{{transport}}": "sum by (transport) (virtuoso_stream_subscribers)"},
        ).stacking(STACKED),
        graph(
            "Refused connections of clients", units.RequestsPerSecond,
            "By the setting whose bound was reached: STREAM_MAX_CLIENTS or STREAM_MAX_PER_CLIENT.",
            {"{{reason}}": "sum by (reason) (rate(virtuoso_stream_refused_total[$__rate_interval]))"},
        ).stacking(STACKED).no_value("none refused"),
        graph(
            "Updates for clients", units.MessagesPerSecond, "Snapshots and updates given to clients, each counted.",
            {"{{channel}}": "sum by (channel) (rate(virtuoso_stream_messages_sent_total[$__rate_interval]))"},
        ).stacking(STACKED),
        graph(
            "Time from exchange's message to clients", units.Seconds,
            "From when a message of an exchange was read until it was written to clients; by way of another replica,"
            " too. A gap: nothing was watched.",
            {"p50": STREAM_AGE.replace("QUANTILE", "0.5"), "p99": STREAM_AGE.replace("QUANTILE", "0.99")},
        ),
        graph(
            "Updates replaced by newer ones", units.MessagesPerSecond,
            "What slow clients did not get, as something newer came before they could take it.",
            {"replaced": "sum(rate(virtuoso_stream_conflated_total[$__rate_interval]))"},
        ),
        graph(
            "Thrown away", units.MessagesPerSecond,
            "`slow_client`: clients that took nothing and were closed. `implausible`: messages of exchanges without a"
            " usable price. `bus`: updates that did not reach the other replicas.",
            {"{{reason}}": "sum by (reason) (rate(virtuoso_stream_dropped_total[$__rate_interval]))"},
        ).stacking(STACKED).no_value("nothing"),
        panel(
            bargauge.Panel(), "Leases that changed hands", units.Short,
            "How often replicas began (`taken`) or ceased (`lost`) to watch a stream for all, in the time shown.",
            {
                "{{to}}":
                "round(sum by (to) (increase(virtuoso_stream_lease_changes_total[$__range])))",
            },
        ).min(0).orientation(styles.VizOrientation.HORIZONTAL),

        dashboard.Row("Clients"),
        graph(
            "Requests by client", units.RequestsPerSecond,
            "By the name of the API key; `anonymous` where no keys are configured, `/admin` for the admin API.",
            {
                "{{client}}":
                'sum by (client) (rate(virtuoso_client_requests_total{outcome="admitted"}[$__rate_interval]))',
            },
            width=HALF,
        ).stacking(STACKED),
        graph(
            "Clients sent away", units.RequestsPerSecond,
            "Requests over the limit of a client, and those without a right key (`unknown`) or admin token (`/admin`).",
            {
                "{{client}}, {{outcome}}":
                "sum by (client, outcome)"
                ' (rate(virtuoso_client_requests_total{outcome!="admitted"}[$__rate_interval]))',
            },
            width=HALF,
        ).stacking(STACKED).no_value("nobody"),
        panel(
            stat.Panel(), "Since the daily maintenance", units.Seconds,
            "Since the last daily run that succeeded. An alert fires when two runs were missed.",
            {
                "daily":
                "time() - max(max_over_time("
                'virtuoso_maintenance_last_success_timestamp_seconds{task="daily"}[7d]))',
            },
            width=HALF, steps={None: "green", 25 * 3600: "orange", 49 * 3600: "red"},
        ).no_value("it never ran"),
        panel(
            stat.Panel(), "Samples per scrape", units.Short,
            "The most that one replica exports. An alert fires above 5,000: then a label takes too many values.",
            {"samples": 'max(scrape_samples_scraped{job="virtuoso"})'}, width=HALF, steps={None: "green", 5000: "red"},
        ).no_value("no replica"),
    ]  # fmt: skip


def exchanges() -> Parts:
    """How are the exchanges, and how much of what they allow is used?"""
    return [
        panel(
            statetimeline.Panel(), "Circuit breakers", units.NoUnit,
            "The worst state on any replica. Open: the exchange is not asked. Half-open: the next call decides.",
            {
                "{{exchange}}":
                'max by (exchange) (virtuoso_circuit_state{exchange=~"$exchange", state="half_open"}'
                ' or 2 * virtuoso_circuit_state{exchange=~"$exchange", state="open"})',
            },
            width=FULL,
        ).mappings([models.ValueMap({
            "0": models.ValueMappingResult("closed", "green"),
            "1": models.ValueMappingResult("half-open", "yellow"),
            "2": models.ValueMappingResult("open", "red"),
        })]).show_value(styles.VisibilityMode.NEVER),
        panel(
            stat.Panel(), "Since the last good answer", units.Seconds,
            "Since an exchange last answered any replica well: nothing here is newer. It grows when nobody asks, too.",
            {
                "{{exchange}}":
                'time() - max by (exchange) (virtuoso_exchange_last_success_timestamp_seconds{exchange=~"$exchange"})',
            },
        ).no_value("none yet"),
        panel(
            stat.Panel(), "Markets listed", units.Short,
            "Markets that can be asked for, on the replica that knows the fewest. 0: its list is not loaded.",
            {"{{exchange}}": 'min by (exchange) (virtuoso_exchange_markets{exchange=~"$exchange"})'},
            steps={None: "red", 1: "green"},
        ),
        panel(
            stat.Panel(), "Budget used now", units.PercentUnit,
            "Share of the allowed request weight that is used, by the highest count. At 100 % no call is made.",
            {"{{exchange}}": 'max by (exchange) (virtuoso_exchange_budget_used_ratio{exchange=~"$exchange"})'},
            steps={None: "green", 0.5: "yellow", 0.9: "red"},
        ).decimals(0),

        dashboard.Row("Calls"),
        graph(
            "Calls", units.RequestsPerSecond, "Calls made to an exchange, all replicas together.",
            {
                "{{exchange}}":
                'sum by (exchange) (rate(virtuoso_exchange_requests_total{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ),
        graph(
            "Time of a call, p95", units.Seconds,
            "95 of 100 calls of the last 5 minutes took at most this long. At EXCHANGE_TIMEOUT_SECONDS it is given up.",
            {"{{exchange}}": 'virtuoso:exchange_request_duration_seconds:p95_5m{exchange=~"$exchange"}'},
        ).no_value("no calls"),
        graph(
            "Budget used", units.PercentUnit,
            "Share of the allowed request weight that is used. Above half nothing is refreshed ahead, at 100 % no call"
            " is made; an alert fires above the line.",
            {"{{exchange}}": 'max by (exchange) (virtuoso_exchange_budget_used_ratio{exchange=~"$exchange"})'},
            steps={None: "green", 0.9: "red"},
        ).axis_soft_max(1),
        graph(
            "Outcomes: $exchange", units.RequestsPerSecond,
            "How the calls ended. Rejected: the exchange refused what was asked for, which is no failure.",
            {
                "{{outcome}}":
                'sum by (outcome) (rate(virtuoso_exchange_requests_total{exchange=~"$exchange"}[$__rate_interval]))',
            },
            width=FULL,
        ).stacking(STACKED).repeat("exchange").repeat_direction("h").override_by_name(
            "success", [models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "green"})]
        ),
        graph(
            "Calls under way", units.Short, "At the moment of the scrape, all replicas together.",
            {"{{exchange}}": 'sum by (exchange) (virtuoso_exchange_in_flight{exchange=~"$exchange"})'},
        ),
        graph(
            "Calls a breaker stopped", units.RequestsPerSecond, "Calls not made because the breaker was open.",
            {
                "{{exchange}}":
                'sum by (exchange) (rate(virtuoso_circuit_rejected_total{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ),
        panel(
            bargauge.Panel(), "Changes of breakers", units.Short,
            "How often breakers changed into a state in the time shown, all replicas together.",
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
            "Open to an exchange, all replicas together: one for each kind of data that is watched, more on some.",
            {"{{exchange}}": 'sum by (exchange) (virtuoso_stream_sockets{exchange=~"$exchange"})'},
        ),
        graph(
            "Messages", units.MessagesPerSecond, "What an exchange pushed, all replicas together.",
            {
                "{{exchange}} {{channel}}":
                "sum by (exchange, channel)"
                ' (rate(virtuoso_stream_messages_received_total{exchange=~"$exchange"}[$__rate_interval]))',
            },
        ),
        panel(
            bargauge.Panel(), "Reconnects", units.Short,
            "How often sockets were lost, or could not be had, in the time shown, by cause: `silent` is one that pushed"
            " nothing. An alert fires at more than 10 in ten minutes that were closed, lost or junk.",
            {
                "{{exchange}} {{cause}}":
                "round(sum by (exchange, cause)"
                ' (increase(virtuoso_stream_reconnects_total{exchange=~"$exchange"}[$__range])))',
            },
            steps={None: "green", 1: "orange"},
        ).min(0).orientation(styles.VizOrientation.HORIZONTAL),
        graph(
            "Watched", units.Short, "Streams that are watched, on the replica that watches the most, held or heard of.",
            {"{{exchange}} {{channel}}": 'max by (exchange, channel) (virtuoso_stream_watched{exchange=~"$exchange"})'},
            width=HALF,
        ),
        graph(
            "Stale", units.Short,
            "Watched streams that an exchange pushes nothing for, on the replica that has the most: those are asked for"
            " by REST. An alert fires after 5 minutes above zero.",
            {"{{exchange}}": 'max by (exchange) (virtuoso_stream_stale{exchange=~"$exchange"})'},
            width=HALF, steps={None: "green", 1: "orange"},
        ),

        dashboard.Row("Age of the data, whatever its exchange"),
        graph(
            "Age of what was served, p50", units.Seconds,
            "Half of the answers of a route were at most this old. An exchange that is down shows as old data.",
            {"{{route}}": AGE.replace("QUANTILE", "0.5")}, width=HALF,
        ),
        graph(
            "Age of what was served, p95", units.Seconds,
            "95 of 100 answers of a route were at most this old. Past its TTL a value is marked stale.",
            {"{{route}}": AGE.replace("QUANTILE", "0.95")}, width=HALF,
        ),
    ]  # fmt: skip


def cache() -> Parts:
    """How much does the cache spare the exchanges, and how old is what it gives out?"""
    return [
        panel(
            stat.Panel(), "Hit rate, 5 minutes", units.PercentUnit,
            "Values that were fresh in memory or in Redis. Under steady use it is above 90 %.",
            {"hits": "virtuoso:cache_hits:ratio_rate5m"}, width=SIXTH, steps=HITS,
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Stale, 10 minutes", units.PercentUnit,
            "Values that were served past their freshness, marked. An alert fires above 20 %: an exchange fails.",
            {"stale": "virtuoso:cache_stale:ratio_rate10m"}, width=SIXTH, steps=STALE,
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Calls spared, 5 minutes", units.PercentUnit,
            "Values that cost no call of their own: hits, old ones, and those another's call brought along.",
            {
                "spared":
                '1 - sum(rate(virtuoso_cache_requests_total{result="miss"}[5m]))'
                " / (sum(rate(virtuoso_cache_requests_total[5m])) > 0)",
            },
            width=SIXTH, steps=HITS,
        ).decimals(1).no_value("no requests"),
        panel(
            stat.Panel(), "Age of the data, p95", units.Seconds,
            "95 of 100 answers of the last 5 minutes were at most this old.",
            {"age": AGE_OF_ALL.replace("QUANTILE", "0.95").replace("$__rate_interval", "5m")}, width=SIXTH,
        ).no_value("no requests"),
        panel(
            stat.Panel(), "Entries in memory", units.Short,
            "On the replica that has the most; CACHE_MEMORY_SIZE is the cap.",
            {"entries": "max(virtuoso_cache_entries)"}, width=SIXTH,
        ).no_value("no replica"),
        panel(
            stat.Panel(), "Redis, seen by the replicas", units.NoUnit,
            "Down as soon as one replica has no answer: then that one caches alone, and clients notice nothing.",
            {"Redis": 'min(virtuoso_cache_tier_up{tier="redis"})'}, width=SIXTH,
        ).mappings([models.ValueMap({
            "0": models.ValueMappingResult("down", "red"),
            "1": models.ValueMappingResult("up", "green"),
        })]).no_value("memory only"),

        dashboard.Row("Answers"),
        graph(
            "How values were found", units.PercentUnit,
            "Shares of all values asked for. coalesced: another's call brought it; negative: a refusal remembered;"
            " stale_error: it stood in for a failed call; stale_revalidate: served during its refresh.",
            {
                "{{result}}":
                "sum by (result) (rate(virtuoso_cache_requests_total[$__rate_interval]))"
                " / ignoring (result) group_left () (sum(rate(virtuoso_cache_requests_total[$__rate_interval])) > 0)",
            },
            width=HALF,
        ).stacking(STACKED).fill_opacity(60).min(0).max(1),
        graph(
            "Hit rate", units.PercentUnit,
            "Values of the last 5 minutes that were fresh in memory or in Redis, against the line at 90 %.",
            {"hits": "virtuoso:cache_hits:ratio_rate5m"}, width=HALF, steps=HITS,
        ).min(0).max(1).no_value("no requests"),
        graph(
            "Age of what was served", units.Seconds, "Half, and 95 of 100, of all answers were at most this old.",
            {"p50": AGE_OF_ALL.replace("QUANTILE", "0.5"), "p95": AGE_OF_ALL.replace("QUANTILE", "0.95")},
        ),
        graph(
            "Stale share", units.PercentUnit,
            "Values of the last 10 minutes served past their freshness, marked. An alert fires above the line.",
            {"stale": "virtuoso:cache_stale:ratio_rate10m"}, steps=STALE,
        ).no_value("no requests"),
        graph(
            "Refreshes ahead", units.CountsPerSecond,
            "What is asked for often is refreshed before it expires. skipped: breaker open or half of the budget used.",
            {"{{outcome}}": "sum by (outcome) (rate(virtuoso_cache_refreshes_total[$__rate_interval]))"},
        ),

        dashboard.Row("Tiers"),
        graph(
            "Memory", units.OpsPerSecond, "Operations on the memory of all replicas.",
            {
                "{{operation}} {{outcome}}":
                "sum by (operation, outcome)"
                ' (rate(virtuoso_cache_tier_operations_total{tier="memory"}[$__rate_interval]))',
            },
        ),
        graph(
            "Redis", units.OpsPerSecond,
            "Operations of all replicas. skipped: Redis failed and is left alone for a moment.",
            {
                "{{operation}} {{outcome}}":
                "sum by (operation, outcome)"
                ' (rate(virtuoso_cache_tier_operations_total{tier="redis"}[$__rate_interval]))',
            },
        ).no_value("memory only"),
        graph(
            "Time of an operation on Redis, p95", units.Seconds,
            "95 of 100 operations took at most this long. A gap: there were none of this kind.",
            {
                "{{operation}}":
                "histogram_quantile(0.95, sum by (operation, le)"
                ' (rate(virtuoso_cache_tier_operation_duration_seconds_bucket{tier="redis"}[$__rate_interval]))) >= 0',
            },
        ).no_value("memory only"),
        graph(
            "Entries in memory, by replica", units.Short, "CACHE_MEMORY_SIZE is the cap of each.",
            {"{{instance}}": "virtuoso_cache_entries"}, width=HALF,
        ),
        graph(
            "Entries that left memory", units.CountsPerSecond,
            "size: memory is full, CACHE_MEMORY_SIZE may be small; expired: too old to stand in; cleared: by /admin.",
            {"{{reason}}": "sum by (reason) (rate(virtuoso_cache_evictions_total[$__rate_interval]))"}, width=HALF,
        ),

        dashboard.Row("Redis itself"),
        graph(
            "Memory of Redis", units.BytesIEC,
            "What it uses and what it may: at the cap it drops what was used longest ago. A cap of 0 is none.",
            {"used": 'redis_memory_used_bytes{job="redis"}', "cap": 'redis_memory_max_bytes{job="redis"}'},
        ).no_value("redis-exporter does not answer"),
        graph(
            "Keys Redis dropped for room", units.CountsPerSecond,
            "0 while it has room. What was dropped is loaded again, but a budget that was dropped counts from nothing.",
            {"dropped": 'rate(redis_evicted_keys_total{job="redis"}[$__rate_interval])'},
        ).no_value("redis-exporter does not answer"),
        graph(
            "Connections to Redis", units.Short, "Of all replicas, and one of the exporter.",
            {"connections": 'redis_connected_clients{job="redis"}'},
        ).no_value("redis-exporter does not answer"),
    ]  # fmt: skip


def render() -> dict[str, str]:
    """Make the JSON of every dashboard by the name of its file, to the letter the same each time."""
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
        "exchanges": (dashboard.Dashboard("Virtuoso: Exchanges").with_variable(exchange), exchanges()),
        "cache": (dashboard.Dashboard("Virtuoso: Cache"), cache()),
    }
    links = dashboard.DashboardLink("Virtuoso").type(models.DashboardLinkType.DASHBOARDS).tags(["virtuoso"])
    note = "What each alert means and what to do about it: `docs/runbook.md` in the repository of the gateway."
    files = {}
    for name, (board, parts) in boards.items():
        for part in parts:
            _ = board.with_row(part) if isinstance(part, dashboard.Row) else board.with_panel(part)
        board.with_panel(text.Panel().content(note).transparent(True).span(FULL).height(2))
        board.uid(f"virtuoso-{name}").tags(["virtuoso"]).link(links.keep_time(True)).readonly()
        board.time("now-1h", "now").refresh("10s").tooltip(models.DashboardCursorSync.CROSSHAIR)
        model = board.build()
        for number, built in enumerate(model.panels or [], start=1):
            built.id_val = number
        files[f"{name}.json"] = JSONEncoder(indent=2, sort_keys=True).encode(model) + "\n"
    return files


if __name__ == "__main__":
    for file, content in render().items():
        (FOLDER / file).write_text(content)
