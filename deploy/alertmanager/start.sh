#!/bin/sh
# Writes Alertmanager's configuration from the environment and becomes Alertmanager.
#
# Where alerts go: ALERT_WEBHOOK_URL, ALERT_SLACK_URL, ALERT_DISCORD_URL; any of them, or none.
# How soon: ALERT_GROUP_WAIT (30s) before the first word of a group, ALERT_GROUP_INTERVAL (1m) before news of it.
# For tests: CONFIG, STORAGE, LISTEN, ALERTMANAGER, AMTOOL.
#
# The addresses are secrets: whoever has one can write to the channel. They are in this file's output only, which nobody
# else may read, and in no message.
set -eu
umask 077

config=${CONFIG:-/tmp/alertmanager.yml}
amtool=${AMTOOL:-/bin/amtool}
wait=${ALERT_GROUP_WAIT:-30s}
interval=${ALERT_GROUP_INTERVAL:-1m}

refuse() {
    echo "alertmanager: $1" >&2
    exit 1
}

# check_url NAME VALUE: an address on one line. What is wrong is named, its value is not.
check_url() {
    case $2 in
    *[[:space:][:cntrl:]]*) refuse "$1 has a space or a control character in it" ;;
    http://?* | https://?*) ;;
    *) refuse "$1 does not begin with http:// or https://" ;;
    esac
}

# check_time NAME VALUE: a duration as Alertmanager writes it, such as 30s.
check_time() {
    case $2 in
    [0-9]*[smh]) ;;
    *) refuse "$1 is no duration such as 30s or 5m" ;;
    esac
    case $2 in
    *[!0-9smh]*) refuse "$1 is no duration such as 30s or 5m" ;;
    esac
}

# quoted VALUE: as a YAML string in single quotes, in which only the quote itself is special.
quoted() {
    printf "'%s'" "$(printf '%s' "$1" | sed "s/'/''/g")"
}

[ -z "${ALERT_WEBHOOK_URL:-}" ] || check_url ALERT_WEBHOOK_URL "$ALERT_WEBHOOK_URL"
[ -z "${ALERT_SLACK_URL:-}" ] || check_url ALERT_SLACK_URL "$ALERT_SLACK_URL"
[ -z "${ALERT_DISCORD_URL:-}" ] || check_url ALERT_DISCORD_URL "$ALERT_DISCORD_URL"
check_time ALERT_GROUP_WAIT "$wait"
check_time ALERT_GROUP_INTERVAL "$interval"

write_routes() {
    cat <<EOF
global:
  resolve_timeout: 5m

# One message for each alert and exchange, however many replicas tell of it. A page that goes on is repeated every hour,
# a ticket every day.
route:
  receiver: operator
  group_by: [alertname, exchange]
  group_wait: $wait
  group_interval: $interval
  repeat_interval: 24h
  routes:
    - matchers: ['severity="page"']
      repeat_interval: 1h

# What follows from another alert that fires is not told as well.
inhibit_rules:
  # Nothing runs: what is still computed is of the time before.
  - source_matchers: ['alertname="VirtuosoTargetAbsent"']
    target_matchers: ['alertname=~"Virtuoso.+"', 'alertname!="VirtuosoTargetAbsent"']
  # All exchanges are gone: each of them is, and old values stand in.
  - source_matchers: ['alertname="VirtuosoAllCircuitsOpen"']
    target_matchers: ['alertname=~"VirtuosoCircuitOpen|VirtuosoExchangeErrors|VirtuosoStaleShareHigh|VirtuosoStream.+"']
  # One exchange is gone: its calls fail, and it pushes nothing.
  - source_matchers: ['alertname="VirtuosoCircuitOpen"']
    target_matchers: ['alertname=~"VirtuosoExchangeErrors|VirtuosoStream.+"']
    equal: [exchange]
  # It pushes nothing: that is why its sockets are opened again and again.
  - source_matchers: ['alertname="VirtuosoStreamStale"']
    target_matchers: ['alertname="VirtuosoStreamFlapping"']
    equal: [exchange]
  # The budget burns fast: then it burns slowly too.
  - source_matchers: ['alertname="VirtuosoErrorBudgetFastBurn"']
    target_matchers: ['alertname="VirtuosoErrorBudgetSlowBurn"']

receivers:
  - name: operator
EOF
}

# What a chat shows: all alerts of the message, each with its description and where the runbook tells more.
# shellcheck disable=SC2016 # a template of Alertmanager, not of the shell
title='[{{ .Status | toUpper }}] {{ .CommonLabels.severity }} {{ .CommonLabels.alertname }} {{ .CommonLabels.exchange }}'
# shellcheck disable=SC2016
text='{{ range .Alerts }}{{ .Annotations.summary }}{{ "\n" }}{{ .Annotations.description }}{{ "\n" }}{{ .Annotations.runbook_url }}{{ "\n\n" }}{{ end }}'

write_receivers() {
    if [ -n "${ALERT_WEBHOOK_URL:-}" ]; then
        cat <<EOF
    webhook_configs:
      - url: $(quoted "$ALERT_WEBHOOK_URL")
        send_resolved: true
EOF
    fi
    if [ -n "${ALERT_SLACK_URL:-}" ]; then
        cat <<EOF
    slack_configs:
      - api_url: $(quoted "$ALERT_SLACK_URL")
        send_resolved: true
        title: $(quoted "$title")
        text: $(quoted "$text")
EOF
    fi
    if [ -n "${ALERT_DISCORD_URL:-}" ]; then
        cat <<EOF
    discord_configs:
      - webhook_url: $(quoted "$ALERT_DISCORD_URL")
        send_resolved: true
        title: $(quoted "$title")
        message: $(quoted "$text")
EOF
    fi
}

rm -f "$config" # a file that was there keeps its own mode
{
    write_routes
    write_receivers
} >"$config"

if [ -z "${ALERT_WEBHOOK_URL:-}${ALERT_SLACK_URL:-}${ALERT_DISCORD_URL:-}" ]; then
    echo "alertmanager: alerts go nowhere: none of ALERT_WEBHOOK_URL, ALERT_SLACK_URL and ALERT_DISCORD_URL is set" >&2
fi

# Alertmanager itself would print an address that it cannot read. A message of amtool would too, so it is not shown.
if [ -x "$amtool" ] && ! "$amtool" check-config "$config" >/dev/null 2>&1; then
    refuse "the configuration is not valid; one of the ALERT_*_URL is no address"
fi

exec "${ALERTMANAGER:-/bin/alertmanager}" \
    --config.file="$config" \
    --storage.path="${STORAGE:-/alertmanager}" \
    --web.listen-address="${LISTEN:-:9093}" \
    --cluster.listen-address=
