#!/usr/bin/env bash
# Builds the image, brings it to where the gateway runs, and puts it in place of what runs there without a failed request.
#
#   ./deploy.sh [OPTIONS]
#     --host USER@SERVER  deploy over ssh; without it, here
#     --dir DIR           where it lies on the server (/opt/virtuoso); .env has to be there before the first time
#     --tag TAG           deploy this image, which is in the registry or here already, instead of building one
#     --rollback          deploy the tag before this one again
#     --dirty             build from a tree with changes that are not committed; the tag then ends in -dirty
#     --dry-run           print each step, and take none that changes anything
#     --help              this text
#
# From the environment: REGISTRY (push to it and pull from it; else the one in .env; with none, the image goes by ssh),
# SMOKE_SYMBOL (BTC-USDT), COMPOSE_PROJECT_NAME, and the times below. .env keeps TAG, PREVIOUS_TAGS and REGISTRY.
# A deployment that fails leaves what ran before. While it runs there are twice as many containers, and twice the memory; the
# new ones answer clients beside the old from the moment their port is open, also while they are being tried.
# Edge, Prometheus, Alertmanager and Grafana are made anew only when their files changed; with the edge's, that costs the
# requests of about a second. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 and more: stopped by a signal.
set -euo pipefail
shopt -s inherit_errexit

# Longest waits, in seconds.
: "${BUILD_SECONDS:=1800}" # to build, to push, to copy an image
: "${STEP_SECONDS:=600}"   # for one command where the gateway runs: some pull images
: "${HEALTHY_SECONDS:=90}" # from the start of a container to its first good health check: there is one every 10 s
: "${READY_SECONDS:=60}"   # until one market list is loaded
: "${SMOKE_SECONDS:=30}"   # until the ticker answers: an exchange may have a hiccup
: "${REST_SECONDS:=180}"   # until all services are healthy
: "${EDGE_SECONDS:=8}"     # the edge looks up the app's addresses every 5 s: it has to know the new before the old go
: "${SMOKE_SYMBOL:=BTC-USDT}"
KEEP=3 LOG_LINES=20 # image tags that are kept, lines of a log that are shown
SSH=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15)
PARTS=(docker-compose.yml prometheus.yml deploy) # what a server needs besides the image
STATE='{{.State.Status}} {{.State.Health.Status}}'
# Asks the gateway in whose container it runs. All it prints is the status, or what went wrong.
PROBE='import sys, urllib.parse, urllib.request
from config import load_settings
try:
    keys = [key.get_secret_value() for key in load_settings().api_keys.values()]
    url = "http://127.0.0.1:8000" + urllib.parse.quote(sys.argv[1])
    request = urllib.request.Request(url, headers={"X-API-Key": keys[0]} if keys else {})
    print(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).status)
except Exception as error:
    sys.exit(str(error) if isinstance(error, OSError) else type(error).__name__)'
# Replaces lines of .env, all at once and with its permissions kept. Arguments: NAME=VALUE...
# shellcheck disable=SC2016 # it is for awk and for the shell over there
EDIT='rm -f .env.new && cp -p .env .env.new && awk '\''
  BEGIN { for (i = 2; i < ARGC; i++) { name = ARGV[i]; sub(/=.*/, "", name); line[name] = ARGV[i]; ARGV[i] = "" } }
  { name = $0; sub(/=.*/, "", name); if (!(name in line)) print; else if (!seen[name]++) print line[name] }
  END { for (name in line) if (!seen[name]) print line[name] }'\'' .env "$@" >.env.new && mv .env.new .env'

host='' dir='' tag='' registry='' image='' current='' was_registry='' from='' to='' history=() kept=() old=() new=() compose=()
build='' rollback='' dirty='' dry='' stage='' failed='' signal='' replicas=0

say() { printf 'deploy: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }
usage() { say "$*; see --help" >&2; exit 2; }
quoted() { # WORD...: as any POSIX shell reads them, and a person; %q would write line feeds as only bash knows them
  local word text=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_/.:,=@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    text+=" $word"
  done
  printf %s "${text# }"
}
show() { printf '%s$ %s\n' "${host:+$host:$dir}" "$*"; }
here() { printf '$ %s\n' "$(quoted "$@")"; [ -n "$dry" ] || timeout --foreground "$BUILD_SECONDS" "$@" </dev/null; }
remote() { timeout --foreground "$1" "${SSH[@]}" "$host" "$2"; } # SECONDS COMMAND
at() { # COMMAND...: run it where the gateway runs, in its directory
  if [ -n "$host" ]; then remote "$STEP_SECONDS" "cd $(quoted "$dir") && $(quoted "$@")" </dev/null
  else timeout --foreground "$STEP_SECONDS" "$@" </dev/null; fi
}
step() { show "$(quoted "$@")"; [ -n "$dry" ] || at "$@"; } # the same for what changes something
value() { at sed -n "s/^$1=[\"']\{0,1\}\([A-Za-z0-9_.:,/-]*\).*/\1/p" .env | tail -n 1; } # NAME: its value in .env
commit_of() { git rev-parse --verify --quiet "${1%-dirty}^{commit}" || :; } # TAG: nothing if it names none
use() { # TAG REGISTRY: what `compose` is about from now on
  tag=$1 registry=$2 image=${2:+$2/}virtuoso
  compose=(env "TAG=$1" "REGISTRY=$2" ${COMPOSE_PROJECT_NAME:+"COMPOSE_PROJECT_NAME=$COMPOSE_PROJECT_NAME"} docker compose)
}
but() { # WORD... -- WORD...: the first ones without the second ones, a line each
  local word rest=" $* "
  for word; do [ "$word" != -- ] || return 0; [[ " ${rest#* -- }" == *" $word "* ]] || printf '%s\n' "$word"; done
}
containers() { # ARRAY OPTION ID...: the app's containers but these
  local text
  text=$(at "${compose[@]}" ps "$2" app)
  # shellcheck disable=SC2086 # a word each
  text=$(but $text -- "${@:3}")
  # shellcheck disable=SC2229 # the array is named by the caller
  read -rd '' -a "$1" <<<"$text" || : # the end is no line feed
}

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --host | --dir | --tag)
        [[ ${2:-} =~ ^[A-Za-z0-9_/.@:][A-Za-z0-9_/.@:-]*$ ]] || usage "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift ;;
      --rollback | --dirty) printf -v "${1#--}" yes ;;
      --dry-run) dry=yes ;;
      --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit ;;
      *) usage "unknown: $1" ;;
    esac
    shift
  done
  [ -z "$tag" ] || [ -z "$rollback$dirty" ] || usage "--tag goes with neither --rollback nor --dirty"
  [ -z "$dir" ] || [ -n "$host" ] || usage "--dir goes with --host"
  dir=${dir:-/opt/virtuoso}
}

check() { # that all is there that will be needed
  local tool place=here
  [ -z "$host" ] || place="in $host:$dir"
  for tool in docker git timeout ${host:+ssh}; do type -P "$tool" >/dev/null || die "$tool is needed here"; done
  at true || die "no command can be run $place: is the directory there?"
  at docker compose version >/dev/null || die "docker compose v2 is needed $place"
  at sh -c '[ -f .env ] && [ ! -L .env ]' || die "no file .env is $place: make it from .env.example, with both passwords"
  ! at test -e .env.before || die ".env.before is $place: a deployment runs, or one was cut off. If none runs, look at" \
    "docker compose ps, then mv .env.before .env, and deploy again"
}

choose() { # the tag; the commits whose files are there and will be
  was_registry=$(value REGISTRY) current=$(value TAG)
  IFS=, read -ra history <<<"$(value PREVIOUS_TAGS)"
  if [ -n "$rollback" ]; then
    tag=${history[0]:-}
    [ -n "$tag" ] || die "no tag was there before: .env has no PREVIOUS_TAGS"
  elif [ -z "$tag" ]; then
    build=yes tag=$(git rev-parse --short HEAD)
    if [ -n "$(git status --porcelain -- . ':!.env.before' ':!.env.new')" ]; then
      [ -n "$dirty" ] || die "there are changes that are not committed: commit them, or say --dirty"
      tag+=-dirty
    fi
  fi
  use "$tag" "${REGISTRY:-$was_registry}"
  from=$(commit_of "$current") to=$(commit_of "$tag")
}

bring_image() {
  [ -z "$build" ] || here docker build --build-arg "VERSION=$tag" --tag "$image:$tag" .
  [ -z "$build" ] || [ -z "$registry" ] || here docker push "$image:$tag"
  if [ -n "$registry" ] && [ "$host$build" != yes ]; then step docker pull "$image:$tag" # built here, it is here
  elif [ -n "$host" ] && [ -z "$rollback" ]; then
    printf '$ docker save %s | ssh %s docker load\n' "$image:$tag" "$host"
    [ -n "$dry" ] || docker save "$image:$tag" | remote "$BUILD_SECONDS" "docker load"
  fi
  [ -n "$dry" ] || at docker image inspect -f '{{.Id}}' "$image:$tag" >/dev/null || die "there is no image $image:$tag"
}

bring_files() { # of the commit `to`
  [ -n "$host" ] || return 0
  [ -n "$to" ] || { say "$tag names no commit here: the files on $host stay as they are"; return 0; }
  local unpack
  unpack="cd $(quoted "$dir") && tar -xpf -"
  printf '$ git archive %s %s | ssh %s %s\n' "$to" "${PARTS[*]}" "$host" "$(quoted "$unpack")"
  [ -n "$dry" ] || git -c tar.umask=022 archive "$to" "${PARTS[@]}" | remote "$STEP_SECONDS" "$unpack"
}

begin() { # .env.before is what is put back, and the sign that a deployment runs
  local line before=(${current:+"$current"} "${history[@]}")
  [ -z "$rollback" ] || before=("${history[@]:1}" "$current")
  mapfile -t before < <(but "${before[@]}" -- "$tag")
  kept=("${before[@]:0:KEEP-1}")
  printf -v line '%s,' "${kept[@]}"
  step ln .env .env.before
  stage=begun
  bring_files
  # Before any container is made: .env is given to the app, and for another one Compose would make it anew.
  set -- "TAG=$tag" "PREVIOUS_TAGS=${line%,}" ${registry:+"REGISTRY=$registry"}
  show "(lines of .env) $*"
  [ -n "$dry" ] || at sh -c "$EDIT" sh "$@"
  [ -n "$dry" ] || at "${compose[@]}" config -q
}

roll() { # new containers of this tag beside those that run, then in their place
  old=() new=(NEW_CONTAINERS)
  if at test -e docker-compose.yml; then containers old -q; fi
  [ "$replicas" -gt 0 ] || replicas=${#old[@]}
  stage=${stage/begun/started}
  if [ ${#old[@]} -eq 0 ]; then
    step "${compose[@]}" up -d --no-build
  else
    step "${compose[@]}" rm -f app # those that ended: they would be started again, old as they are
    step "${compose[@]}" up -d --no-build --no-deps --no-recreate --scale "app=$((${#old[@]} + replicas))" app
  fi
  [ -n "$dry" ] || containers new -q "${old[@]}"
  [ ${#new[@]} -gt 0 ] || die "no new container is there"
  [ "$replicas" -gt 0 ] || replicas=${#new[@]}
  prove
  [ ${#old[@]} -gt 0 ] || return 0
  show "sleep $EDGE_SECONDS"
  [ -n "$dry" ] || sleep "$EDGE_SECONDS"
  stage=switched
  step docker stop "${old[@]}"
  step docker rm "${old[@]}"
}

prove() { # that the new containers are healthy, ready, and have a price
  local id
  for id in "${new[@]}"; do until_healthy "$id"; done
  for id in "${new[@]}"; do
    until_answered "$id" /health/ready "$READY_SECONDS"
    until_answered "$id" "/ticker/$SMOKE_SYMBOL" "$SMOKE_SECONDS"
  done
}
until_healthy() { # CONTAINER
  local state end=$((SECONDS + HEALTHY_SECONDS))
  show "docker inspect -f $(quoted "$STATE") $1 (until it is healthy, at most $HEALTHY_SECONDS s)"
  [ -z "$dry" ] || return 0
  failed=$1
  while :; do
    state=$(at docker inspect -f "$STATE" "$1")
    [ "$state" != "running healthy" ] || break
    [[ $state == "running starting" && $SECONDS -lt $end ]] || die "container $1 does not get healthy: it is $state"
    sleep 1
  done
  failed=''
}
until_answered() { # CONTAINER PATH SECONDS
  local told end=$((SECONDS + $3))
  show "docker exec $1 python -c ... $2 (until it answers 200, at most $3 s)"
  [ -z "$dry" ] || return 0
  failed=$1
  until told=$(at docker exec "$1" python -c "$PROBE" "$2" 2>&1); do
    [ $SECONDS -lt "$end" ] || die "container $1 does not answer $2: $told"
    sleep 1
  done
  failed=''
}

rest() { # the other services; they read their files at the start, so those with other files are made anew
  local service paths wait=(--wait --wait-timeout "$REST_SECONDS")
  step "${compose[@]}" up -d --no-build --remove-orphans "${wait[@]}" --scale "app=$replicas"
  [ ${#old[@]} -gt 0 ] && [ -n "$host$build" ] || return 0 # the first time all are new, and what is not brought stays
  for service in edge prometheus alertmanager grafana; do
    paths=("deploy/$service")
    [ $service != prometheus ] || paths+=(prometheus.yml)
    if ! git diff --quiet "${from:-unknown}" ${host:+"${to:-$from}"} -- "${paths[@]}" 2>/dev/null; then
      step "${compose[@]}" up -d --no-build --no-deps --force-recreate "${wait[@]}" "$service"
    fi
  done
}

prune() { # images of older tags, where the gateway runs and where they were built
  local run=step look=at found name
  [ "${1:-}" != here ] || run=here look=command
  found=$($look docker image ls --format '{{.Tag}}' "$image")
  # shellcheck disable=SC2086 # a word each
  for name in $(but $found -- "$tag" "${kept[@]}"); do
    if [[ $name =~ ^[0-9a-f]{7,40}(-dirty)?$ ]]; then
      $run docker image rm "$image:$name" || say "stays, as something uses it: $image:$name"
    fi
  done
}

put_back() { # before the switch: the new containers go, and what ran is still running
  local added
  if [ "$stage" = started ] && containers added -aq "${old[@]}" && [ ${#added[@]} -gt 0 ]; then
    at docker logs --tail "$LOG_LINES" "${failed:-${added[0]}}" 2>&1 | sed 's/^/  | /' >&2
    step docker rm -f "${added[@]}"
  fi
  to=$from
  [ -z "$to" ] || bring_files
  step mv .env.before .env || say "that could not be put back: .env.before is still there" >&2
  say "nothing was replaced: what ran before still runs, tag ${current:-none}" >&2
}
bring_back() { # after the switch: the previous tag, the way the new one came
  at "${compose[@]}" ps >&2
  say "it failed after the switch: tag ${current:-latest} comes back" >&2
  from=$to to=$(commit_of "$current")
  bring_files
  step mv .env.before .env
  use "$current" "$was_registry"
  (set -e; roll; rest)
}
finish() { # at every end: leave something that can be named, and name it
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # cleaning up is not left half done
  set +e
  [ -z "$signal" ] || say "stopped by SIG$signal" >&2
  case $stage$signal in
    begun* | started*) put_back ;;
    switched)
      bring_back # not as a condition, or it would not stop at its first failure
      case $? in
        0) say "tag ${current:-latest} runs again" >&2 ;;
        *) say "that failed too: see docker compose ps; .env names tag ${current:-latest}" >&2 ;;
      esac ;;
    switched*)
      step docker rm -f "${old[@]}"
      step rm -f .env.before
      say "tag $tag runs and is checked; the other services may be as before: deploy again" >&2 ;;
  esac
  [ $code -eq 0 ] || [ -n "$signal" ] || code=1
  exit $code
}

main() {
  parse "$@"
  cd "$(dirname "$(readlink -f "$0")")"
  check
  choose
  trap finish EXIT
  for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # now
    trap "signal=$signal; exit $((128 + $(kill -l $signal)))" $signal
  done
  signal=''
  say "tag $tag in place of ${current:-none}"
  bring_image
  begin
  roll
  rest
  stage=''
  step rm .env.before
  prune
  [ -z "$host" ] || prune here
  say "tag $tag runs${dry:+, it would}"
}
main "$@"
