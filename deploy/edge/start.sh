#!/bin/sh
# Runs both halves of the edge, and reloads the inner one when the addresses of the gateways change. From nginx 1.27.3 on,
# `server app:8000 resolve` and a resolver could follow them without a second nginx; this works with every nginx, and with
# whatever the system resolves names by.
#
#   EDGE_UPSTREAM  name of the gateways (app)
#   EDGE_INTERVAL  seconds between two look-ups (5)
#   EDGE_CONFIG    where nginx.conf and upstream.conf are (/etc/nginx)
set -u

upstream=${EDGE_UPSTREAM:-app}
interval=${EDGE_INTERVAL:-5}
config=${EDGE_CONFIG:-/etc/nginx}

say() { printf 'edge: %s\n' "$*" >&2; }
addresses() { getent ahostsv4 "$upstream" | awk '{print $1}' | sort -u | tr '\n' ' '; }
# Stops an nginx: QUIT lets requests finish, within worker_shutdown_timeout. While nginx starts it ignores QUIT, so it is repeated.
quit() { kill -QUIT "$1" 2>/dev/null && sleep 0.1 && while kill -QUIT "$1" 2>/dev/null; do sleep 1; done; }
stop_inner() { [ -z "$inner" ] || quit "$inner"; }
run() { exec nginx -c "$config/$1" -g 'daemon off;'; }

# Starts the inner half once there is an address, and again should it ever end; until then the outer one answers 502.
# Ends on TERM. It also ends when the outer half is gone: a TERM that arrives before the trap is set is lost.
follow() {
  inner='' known=''
  trap 'stop_inner; exit 0' TERM
  while kill -0 "$outer" 2>/dev/null; do
    found=$(addresses)
    if [ -n "$inner" ] && ! kill -0 "$inner" 2>/dev/null; then
      say "the inner nginx has ended"
      inner=''
    fi
    if [ -z "$found" ]; then
      [ -n "$known" ] || say "$upstream cannot be resolved yet"
    elif [ -z "$inner" ]; then
      run upstream.conf &
      inner=$! known=$found
      say "$upstream is at $found"
    # It reads the whole configuration first. When that fails, nothing changes, and the next round tries again.
    elif [ "$found" != "$known" ] && nginx -c "$config/upstream.conf" -g 'daemon off;' -s reload; then
      known=$found
      say "$upstream is now at $found"
    fi
    sleep "$interval" &
    wait $! # a signal ends it at once, as it would not end a sleep
  done
  stop_inner
}

run nginx.conf &
outer=$!
# Containers and people send TERM. On TERM nginx would drop the requests that it is answering.
trap 'quit "$outer"' TERM QUIT INT
trap 'kill -HUP "$outer"' HUP # after a new certificate
follow &
follower=$!

# A signal also ends `wait`, with a code above 128; the next `wait` returns the exit code of nginx. It returns 127 when the
# code above 128 was that of nginx. The inner half ends last: requests that are being answered need it.
wait "$outer"
code=$?
while [ "$code" -gt 128 ]; do
  wait "$outer"
  again=$?
  [ "$again" -ne 127 ] || break
  code=$again
done
kill "$follower" && wait "$follower"
exit "$code"
