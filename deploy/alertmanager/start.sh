#!/bin/sh
# Write the Alertmanager configuration from environment variables, then start Alertmanager.
#
#   ALERT_WEBHOOK_URL, ALERT_SLACK_URL, ALERT_DISCORD_URL  receivers of alerts; all optional
#   ALERT_GROUP_WAIT      delay before the first message of a group (30s)
#   ALERT_GROUP_INTERVAL  delay before a message about changes in a group (1m)
#   CONFIG, STORAGE, LISTEN, ALERTMANAGER, AMTOOL          for tests
#
# The URLs are secrets: anyone who has a URL can post to the channel. They are written only to the
# configuration file, which no other user can read, and never to the log.
set -eu
umask 077

config=${CONFIG:-/tmp/alertmanager.yml}
amtool=${AMTOOL:-/bin/amtool}
wait=${ALERT_GROUP_WAIT:-30s}
interval=${ALERT_GROUP_INTERVAL:-1m}

fail() {
    echo "alertmanager: $1" >&2
    exit 1
}

# check_url NAME VALUE: exit unless VALUE is a URL on one line. The message never contains VALUE.
check_url() {
    case $2 in
    *[[:space:][:cntrl:]]*) fail "$1 is invalid: it contains a space or a control character" ;;
    http://?* | https://?*) ;;
    *) fail "$1 is invalid: it must start with http:// or https://" ;;
    esac
}

# check_duration NAME VALUE: exit unless VALUE is a duration of Alertmanager, for example 30s.
check_duration() {
    case $2 in
    [0-9]*[smh]) ;;
    *) fail "$1=$2 is invalid: expected a duration, for example 30s or 5m" ;;
    esac
    case $2 in
    *[!0-9smh]*) fail "$1=$2 is invalid: expected a duration, for example 30s or 5m" ;;
    esac
}

# quote VALUE: print a YAML string in single quotes, in which only the quote itself is special.
quote() {
    printf "'%s'" "$(printf '%s' "$1" | sed "s/'/''/g")"
}

[ -z "${ALERT_WEBHOOK_URL:-}" ] || check_url ALERT_WEBHOOK_URL "$ALERT_WEBHOOK_URL"
[ -z "${ALERT_SLACK_URL:-}" ] || check_url ALERT_SLACK_URL "$ALERT_SLACK_URL"
[ -z "${ALERT_DISCORD_URL:-}" ] || check_url ALERT_DISCORD_URL "$ALERT_DISCORD_URL"
check_duration ALERT_GROUP_WAIT "$wait"
check_duration ALERT_GROUP_INTERVAL "$interval"

write_routes() {
    cat <<EOF
global:
  resolve_timeout: 5m

# One message per alert and exchange, for any number of replicas. A page is repeated every hour, a
# ticket every day.
route:
  receiver: operator
  group_by: [alertname, exchange]
  group_wait: $wait
  group_interval: $interval
  repeat_interval: 24h
  routes:
    - matchers: ['severity="page"']
      repeat_interval: 1h

# Alerts that are a consequence of another firing alert are suppressed.
inhibit_rules:
  # No replica runs: other alerts are based on old data.
  - source_matchers: ['alertname="VirtuosoTargetAbsent"']
    target_matchers: ['alertname=~"Virtuoso.+"', 'alertname!="VirtuosoTargetAbsent"']
  # All exchanges are down: alerts of single exchanges and stale values follow from that.
  - source_matchers: ['alertname="VirtuosoAllCircuitsOpen"']
    target_matchers:
      - 'alertname=~"VirtuosoCircuitOpen|VirtuosoExchangeErrors|VirtuosoStaleShareHigh|VirtuosoStream.+"'
  # One exchange is down: its calls fail and it pushes no updates.
  - source_matchers: ['alertname="VirtuosoCircuitOpen"']
    target_matchers: ['alertname=~"VirtuosoExchangeErrors|VirtuosoStream.+"']
    equal: [exchange]
  # An exchange pushes no updates: the gateway reconnects repeatedly for that reason.
  - source_matchers: ['alertname="VirtuosoStreamStale"']
    target_matchers: ['alertname="VirtuosoStreamFlapping"']
    equal: [exchange]
  # The fast burn rate of the error budget implies the slow burn rate.
  - source_matchers: ['alertname="VirtuosoErrorBudgetFastBurn"']
    target_matchers: ['alertname="VirtuosoErrorBudgetSlowBurn"']

receivers:
  - name: operator
EOF
}

# Text of chat messages: summary, description and runbook section of every alert in the group.
title='[{{ .Status | toUpper }}] {{ .CommonLabels.severity }} {{ .CommonLabels.alertname }}'
title="$title {{ .CommonLabels.exchange }}"
text='{{ range .Alerts }}{{ .Annotations.summary }}{{ "\n" }}{{ .Annotations.description }}{{ "\n" }}'
text="$text"'{{ .Annotations.runbook_url }}{{ "\n\n" }}{{ end }}'

write_receivers() {
    if [ -n "${ALERT_WEBHOOK_URL:-}" ]; then
        cat <<EOF
    webhook_configs:
      - url: $(quote "$ALERT_WEBHOOK_URL")
        send_resolved: true
EOF
    fi
    if [ -n "${ALERT_SLACK_URL:-}" ]; then
        cat <<EOF
    slack_configs:
      - api_url: $(quote "$ALERT_SLACK_URL")
        send_resolved: true
        title: $(quote "$title")
        text: $(quote "$text")
EOF
    fi
    if [ -n "${ALERT_DISCORD_URL:-}" ]; then
        cat <<EOF
    discord_configs:
      - webhook_url: $(quote "$ALERT_DISCORD_URL")
        send_resolved: true
        title: $(quote "$title")
        message: $(quote "$text")
EOF
    fi
}

rm -f "$config" # an existing file would keep its permissions
{
    write_routes
    write_receivers
} >"$config"

if [ -z "${ALERT_WEBHOOK_URL:-}${ALERT_SLACK_URL:-}${ALERT_DISCORD_URL:-}" ]; then
    echo "alertmanager: alerts are not sent: set ALERT_WEBHOOK_URL, ALERT_SLACK_URL or" \
        "ALERT_DISCORD_URL" >&2
fi

# Alertmanager and amtool print a URL that they cannot parse, so the output of amtool is discarded.
if [ -x "$amtool" ] && ! "$amtool" check-config "$config" >/dev/null 2>&1; then
    fail "the configuration is invalid: one of the ALERT_*_URL variables is not a valid URL"
fi

exec "${ALERTMANAGER:-/bin/alertmanager}" \
    --config.file="$config" \
    --storage.path="${STORAGE:-/alertmanager}" \
    --web.listen-address="${LISTEN:-:9093}" \
    --cluster.listen-address=
