#!/bin/sh
# Run both halves of the edge, and reload the inner half when the addresses of the gateways change.
# nginx 1.27.3 and newer could follow the addresses with `server app:8000 resolve` and a resolver.
# This script works with every nginx version and uses the name resolution of the system.
#
#   EDGE_UPSTREAM  DNS name of the gateways (app)
#   EDGE_INTERVAL  seconds between two DNS lookups (5)
#   EDGE_CONFIG    folder of nginx.conf and upstream.conf (/etc/nginx)
set -u

upstream=${EDGE_UPSTREAM:-app}
interval=${EDGE_INTERVAL:-5}
config=${EDGE_CONFIG:-/etc/nginx}

log() { printf 'edge: %s\n' "$*" >&2; }
resolve() { getent ahostsv4 "$upstream" | awk '{print $1}' | sort -u | tr '\n' ' '; }
# Stop an nginx process. QUIT lets requests finish within worker_shutdown_timeout. nginx ignores
# QUIT while it starts, so the signal is repeated.
stop() {
  kill -QUIT "$1" 2>/dev/null || return 0
  sleep 0.1
  while kill -QUIT "$1" 2>/dev/null; do sleep 1; done
}
stop_inner() { [ -z "$inner" ] || stop "$inner"; }
run() { exec nginx -c "$config/$1" -g 'daemon off;'; }

# Start the inner half when the name has an address, and restart it if it ends. Until then the outer
# half answers 502. The loop ends on TERM. It also ends when the outer half is gone, because a TERM
# that arrives before the trap is set is lost.
follow() {
  inner=''
  known=''
  trap 'stop_inner; exit 0' TERM
  while kill -0 "$outer" 2>/dev/null; do
    found=$(resolve)
    if [ -n "$inner" ] && ! kill -0 "$inner" 2>/dev/null; then
      log "the inner nginx has ended, starting it again"
      inner=''
    fi
    if [ -z "$found" ]; then
      [ -n "$known" ] || log "$upstream cannot be resolved yet"
    elif [ -z "$inner" ]; then
      run upstream.conf &
      inner=$!
      known=$found
      log "$upstream is at $found"
    # A reload reads the configuration first. If that fails, nothing changes and the next round
    # retries.
    elif [ "$found" != "$known" ] &&
      nginx -c "$config/upstream.conf" -g 'daemon off;' -s reload; then
      known=$found
      log "$upstream is now at $found"
    fi
    sleep "$interval" &
    wait $! # a signal interrupts wait immediately, but not sleep
  done
  stop_inner
}

run nginx.conf &
outer=$!
# Container engines send TERM, but nginx would drop open requests on TERM.
trap 'stop "$outer"' TERM QUIT INT
trap 'kill -HUP "$outer"' HUP # reload a renewed certificate
follow &
follower=$!

# A signal also interrupts `wait`, with a code above 128. The next `wait` returns the exit code of
# nginx, or 127 if the code above 128 was that of nginx. The inner half stops last, because open
# requests need it.
wait "$outer"
code=$?
while [ "$code" -gt 128 ]; do
  wait "$outer"
  next_code=$?
  [ "$next_code" -ne 127 ] || break
  code=$next_code
done
kill "$follower" && wait "$follower"
exit "$code"
