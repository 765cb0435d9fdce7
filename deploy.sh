#!/usr/bin/env bash
# Build the image, copy it to the machine of the gateway, and replace the running containers without
# failed requests.
#
#   ./deploy.sh [OPTIONS]
#     --host USER@SERVER  deploy over ssh; without it, deploy on this machine
#     --dir DIR           directory on the server (/opt/virtuoso); .env must exist there
#     --tag TAG           deploy an existing image of the registry or this machine, without a build
#     --rollback          deploy the previous tag
#     --dirty             build with uncommitted changes; the tag ends in -dirty
#     --dry-run           print all steps without changing anything
#     --help              print this text
#
# Environment variables: REGISTRY (registry to push to and pull from; default: the value in .env; if
# empty, the image is copied over ssh), SMOKE_SYMBOL (BTC-USDT), COMPOSE_PROJECT_NAME, and the
# timeouts below. .env stores TAG, PREVIOUS_TAGS and REGISTRY.
#
# A failed deployment keeps the previous version running. During a deployment, twice as many
# containers run and need twice the memory. New containers serve clients beside the old ones as soon
# as their port is open, also during the checks. Edge, Prometheus, Alertmanager and Grafana are
# recreated only when their files changed; recreating the edge fails the requests of about one
# second.
#
# Exit codes: 0 success, 1 failure, 2 invalid usage, 128 and above: stopped by a signal.
set -euo pipefail
shopt -s inherit_errexit

# Timeouts in seconds.
: "${BUILD_SECONDS:=1800}" # build, push or copy an image
: "${STEP_SECONDS:=600}"   # one command on the target machine; some commands pull images
: "${HEALTHY_SECONDS:=90}" # first successful health check of a container; checks run every 10 s
: "${READY_SECONDS:=60}"   # first market list of a container
: "${SMOKE_SECONDS:=30}"   # first ticker response; allows for a short failure of an exchange
: "${REST_SECONDS:=180}"   # health of all services
: "${EDGE_SECONDS:=8}"     # pause before old containers stop: the edge resolves addresses every 5 s
: "${SMOKE_SYMBOL:=BTC-USDT}"
KEEP=3       # number of image tags to keep
LOG_LINES=20 # lines of a failed container's log to print
SSH=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15)
FILES=(docker-compose.yml prometheus.yml deploy) # files that a server needs besides the image
STATE='{{.State.Status}} {{.State.Health.Status}}'
# Python program that requests a path from the gateway in its container. Prints the status or the
# error.
PROBE='import sys, urllib.parse, urllib.request
from config import load_settings
try:
    keys = [key.get_secret_value() for key in load_settings().api_keys.values()]
    url = "http://127.0.0.1:8000" + urllib.parse.quote(sys.argv[1])
    request = urllib.request.Request(url, headers={"X-API-Key": keys[0]} if keys else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    print(opener.open(request, timeout=10).status)
except Exception as error:
    sys.exit(str(error) if isinstance(error, OSError) else type(error).__name__)'
# Shell command that replaces lines of .env atomically and keeps its permissions. Arguments:
# NAME=VALUE...
# shellcheck disable=SC2016 # expanded by awk and by the shell on the target machine
EDIT='rm -f .env.new && cp -p .env .env.new && awk '\''
  BEGIN {
    for (i = 2; i < ARGC; i++) {
      name = ARGV[i]
      sub(/=.*/, "", name)
      line[name] = ARGV[i]
      ARGV[i] = ""
    }
  }
  {
    name = $0
    sub(/=.*/, "", name)
    if (!(name in line)) print
    else if (!seen[name]++) print line[name]
  }
  END { for (name in line) if (!seen[name]) print line[name] }
'\'' .env "$@" >.env.new && mv .env.new .env'

host='' dir='' tag='' registry='' image='' current='' current_registry='' from='' to=''
history=() kept=() old=() new=() compose=()
build='' rollback='' dirty='' dry='' stage='' failed='' signal='' replicas=0

log() { printf 'deploy: %s\n' "$*"; }
die() { log "$*" >&2; exit 1; }
usage() { log "$*; see --help" >&2; exit 2; }
quote() { # WORD...: quote words for any POSIX shell; %q would use bash syntax for line feeds
  local word text=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_/.:,=@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    text+=" $word"
  done
  printf %s "${text# }"
}
print_step() { printf '%s$ %s\n' "${host:+$host:$dir}" "$*"; }
run_here() { # COMMAND...: print and run a command on this machine
  printf '$ %s\n' "$(quote "$@")"
  [ -n "$dry" ] || timeout --foreground "$BUILD_SECONDS" "$@" </dev/null
}
run_ssh() { timeout --foreground "$1" "${SSH[@]}" "$host" "$2"; } # SECONDS COMMAND
run() { # COMMAND...: run a command in the directory of the gateway, on the target machine
  if [ -n "$host" ]; then
    run_ssh "$STEP_SECONDS" "cd $(quote "$dir") && $(quote "$@")" </dev/null
  else
    timeout --foreground "$STEP_SECONDS" "$@" </dev/null
  fi
}
step() { # COMMAND...: print and run a command that changes something
  print_step "$(quote "$@")"
  [ -n "$dry" ] || run "$@"
}
setting() { # NAME: print its value in .env
  run sed -n "s/^$1=[\"']\{0,1\}\([A-Za-z0-9_.:,/-]*\).*/\1/p" .env | tail -n 1
}
commit_of() { # TAG: print its commit, or nothing if there is none
  git rev-parse --verify --quiet "${1%-dirty}^{commit}" || :
}
select_image() { # TAG REGISTRY: use this image in all following compose commands
  tag=$1 registry=$2 image=${2:+$2/}virtuoso
  compose=(env "TAG=$1" "REGISTRY=$2")
  [ -z "${COMPOSE_PROJECT_NAME:-}" ] || compose+=("COMPOSE_PROJECT_NAME=$COMPOSE_PROJECT_NAME")
  compose+=(docker compose)
}
exclude() { # WORD... -- WORD...: print the words before -- that do not occur after it, one per line
  local word rest=" $* "
  for word; do
    [ "$word" != -- ] || return 0
    [[ " ${rest#* -- }" == *" $word "* ]] || printf '%s\n' "$word"
  done
}
list_containers() { # ARRAY OPTION ID...: store the ids of the app's containers, except these ids
  local text
  text=$(run "${compose[@]}" ps "$2" app)
  # shellcheck disable=SC2086 # split into words
  text=$(exclude $text -- "${@:3}")
  # shellcheck disable=SC2229 # the caller names the array
  read -rd '' -a "$1" <<<"$text" || : # read fails because the input does not end with NUL
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
      *) usage "unknown option $1" ;;
    esac
    shift
  done
  [ -z "$tag" ] || [ -z "$rollback$dirty" ] ||
    usage "--tag cannot be combined with --rollback or --dirty"
  [ -z "$dir" ] || [ -n "$host" ] || usage "--dir requires --host"
  dir=${dir:-/opt/virtuoso}
}

check_requirements() {
  local tool place=here
  [ -z "$host" ] || place="in $host:$dir"
  for tool in docker git timeout ${host:+ssh}; do
    type -P "$tool" >/dev/null || die "$tool is not installed on this machine"
  done
  run true || die "cannot run commands $place: check that the host and the directory exist"
  run docker compose version >/dev/null || die "docker compose v2 is not installed $place"
  run sh -c '[ -f .env ] && [ ! -L .env ]' ||
    die "no file .env $place: create it from .env.example and set both passwords"
  ! run test -e .env.before || die ".env.before exists $place: another deployment is running or" \
    "was interrupted. If none is running, check docker compose ps, run mv .env.before .env and" \
    "deploy again"
}

choose_tag() { # set the tag, and the commits of the current files (from) and of the new files (to)
  current_registry=$(setting REGISTRY)
  current=$(setting TAG)
  IFS=, read -ra history <<<"$(setting PREVIOUS_TAGS)"
  if [ -n "$rollback" ]; then
    tag=${history[0]:-}
    [ -n "$tag" ] || die "cannot roll back: .env has no PREVIOUS_TAGS"
  elif [ -z "$tag" ]; then
    build=yes
    tag=$(git rev-parse --short HEAD)
    if [ -n "$(git status --porcelain -- . ':!.env.before' ':!.env.new')" ]; then
      [ -n "$dirty" ] || die "there are uncommitted changes: commit them or use --dirty"
      tag+=-dirty
    fi
  fi
  select_image "$tag" "${REGISTRY:-$current_registry}"
  from=$(commit_of "$current")
  to=$(commit_of "$tag")
}

transfer_image() {
  [ -z "$build" ] || run_here docker build --build-arg "VERSION=$tag" --tag "$image:$tag" .
  [ -z "$build" ] || [ -z "$registry" ] || run_here docker push "$image:$tag"
  if [ -n "$registry" ] && [ "$host$build" != yes ]; then # a new image already exists here
    step docker pull "$image:$tag"
  elif [ -n "$host" ] && [ -z "$rollback" ]; then
    printf '$ docker save %s | ssh %s docker load\n' "$image:$tag" "$host"
    [ -n "$dry" ] || docker save "$image:$tag" | run_ssh "$BUILD_SECONDS" "docker load"
  fi
  [ -n "$dry" ] || run docker image inspect -f '{{.Id}}' "$image:$tag" >/dev/null ||
    die "image $image:$tag does not exist"
}

transfer_files() { # copy the files of the commit in `to` to the server
  [ -n "$host" ] || return 0
  [ -n "$to" ] || { log "no commit for tag $tag: the files on $host are not changed"; return 0; }
  local unpack
  unpack="cd $(quote "$dir") && tar -xpf -"
  printf '$ git archive %s %s | ssh %s %s\n' "$to" "${FILES[*]}" "$host" "$(quote "$unpack")"
  [ -n "$dry" ] || git -c tar.umask=022 archive "$to" "${FILES[@]}" |
    run_ssh "$STEP_SECONDS" "$unpack"
}

begin() { # .env.before is the backup for a failure, and marks a running deployment
  local line previous=(${current:+"$current"} "${history[@]}")
  [ -z "$rollback" ] || previous=("${history[@]:1}" "$current")
  mapfile -t previous < <(exclude "${previous[@]}" -- "$tag")
  kept=("${previous[@]:0:KEEP-1}")
  printf -v line '%s,' "${kept[@]}"
  step ln .env .env.before
  stage=begun
  transfer_files
  # .env changes before any container is created: Compose recreates the app if .env differs.
  set -- "TAG=$tag" "PREVIOUS_TAGS=${line%,}" ${registry:+"REGISTRY=$registry"}
  print_step "(lines of .env) $*"
  [ -n "$dry" ] || run sh -c "$EDIT" sh "$@"
  [ -n "$dry" ] || run "${compose[@]}" config -q
}

replace_containers() { # start new containers beside the old ones, check them, stop the old ones
  old=() new=(NEW_CONTAINERS)
  if run test -e docker-compose.yml; then list_containers old -q; fi
  [ "$replicas" -gt 0 ] || replicas=${#old[@]}
  stage=${stage/begun/started}
  if [ ${#old[@]} -eq 0 ]; then
    step "${compose[@]}" up -d --no-build
  else
    step "${compose[@]}" rm -f app # Compose would restart stopped containers with the old image
    step "${compose[@]}" up -d --no-build --no-deps --no-recreate \
      --scale "app=$((${#old[@]} + replicas))" app
  fi
  [ -n "$dry" ] || list_containers new -q "${old[@]}"
  [ ${#new[@]} -gt 0 ] || die "no new container was started"
  [ "$replicas" -gt 0 ] || replicas=${#new[@]}
  check_new_containers
  [ ${#old[@]} -gt 0 ] || return 0
  print_step "sleep $EDGE_SECONDS"
  [ -n "$dry" ] || sleep "$EDGE_SECONDS"
  stage=switched
  step docker stop "${old[@]}"
  step docker rm "${old[@]}"
}

check_new_containers() { # wait until all are healthy, ready and return a ticker
  local id
  for id in "${new[@]}"; do wait_healthy "$id"; done
  for id in "${new[@]}"; do
    wait_response "$id" /health/ready "$READY_SECONDS"
    wait_response "$id" "/ticker/$SMOKE_SYMBOL" "$SMOKE_SECONDS"
  done
}
wait_healthy() { # CONTAINER
  local state end=$((SECONDS + HEALTHY_SECONDS))
  print_step "docker inspect -f $(quote "$STATE") $1 (until healthy, at most $HEALTHY_SECONDS s)"
  [ -z "$dry" ] || return 0
  failed=$1
  while :; do
    state=$(run docker inspect -f "$STATE" "$1")
    [ "$state" != "running healthy" ] || break
    [[ $state == "running starting" && $SECONDS -lt $end ]] ||
      die "container $1 is not healthy: its state is $state"
    sleep 1
  done
  failed=''
}
wait_response() { # CONTAINER PATH SECONDS
  local output end=$((SECONDS + $3))
  print_step "docker exec $1 python -c ... $2 (until status 200, at most $3 s)"
  [ -z "$dry" ] || return 0
  failed=$1
  until output=$(run docker exec "$1" python -c "$PROBE" "$2" 2>&1); do
    [ $SECONDS -lt "$end" ] || die "container $1 does not answer $2: $output"
    sleep 1
  done
  failed=''
}

update_services() { # start the other services; recreate those whose files changed
  local service paths wait=(--wait --wait-timeout "$REST_SECONDS")
  step "${compose[@]}" up -d --no-build --remove-orphans "${wait[@]}" --scale "app=$replicas"
  [ ${#old[@]} -gt 0 ] && [ -n "$host$build" ] || return 0 # first deployment, or no new files
  for service in edge prometheus alertmanager grafana; do
    paths=("deploy/$service")
    [ $service != prometheus ] || paths+=(prometheus.yml)
    if ! git diff --quiet "${from:-unknown}" ${host:+"${to:-$from}"} -- "${paths[@]}" 2>/dev/null
    then
      step "${compose[@]}" up -d --no-build --no-deps --force-recreate "${wait[@]}" "$service"
    fi
  done
}

remove_old_images() { # [here]: remove images of older tags on the target machine, or here
  local change=step query=run tags name
  [ "${1:-}" != here ] || change=run_here query=command
  tags=$($query docker image ls --format '{{.Tag}}' "$image")
  # shellcheck disable=SC2086 # split into words
  for name in $(exclude $tags -- "$tag" "${kept[@]}"); do
    if [[ $name =~ ^[0-9a-f]{7,40}(-dirty)?$ ]]; then
      $change docker image rm "$image:$name" || log "image $image:$name is in use and is kept"
    fi
  done
}

undo() { # failure before the old containers were stopped: remove the new ones and restore the files
  local added
  if [ "$stage" = started ] && list_containers added -aq "${old[@]}" && [ ${#added[@]} -gt 0 ]; then
    run docker logs --tail "$LOG_LINES" "${failed:-${added[0]}}" 2>&1 | sed 's/^/  | /' >&2
    step docker rm -f "${added[@]}"
  fi
  to=$from
  [ -z "$to" ] || transfer_files
  step mv .env.before .env || log "cannot restore .env: .env.before still exists" >&2
  log "nothing was replaced: tag ${current:-none} is still running" >&2
}
restore() { # failure after the old containers were stopped: deploy the previous tag again
  run "${compose[@]}" ps >&2
  log "the deployment failed after the switch: restoring tag ${current:-latest}" >&2
  from=$to
  to=$(commit_of "$current")
  transfer_files
  step mv .env.before .env
  select_image "$current" "$current_registry"
  (set -e; replace_containers; update_services)
}
finish() { # exit trap: clean up and print the resulting state
  local code=$?
  trap - EXIT
  trap '' INT TERM HUP # do not interrupt the cleanup
  set +e
  [ -z "$signal" ] || log "stopped by SIG$signal" >&2
  case $stage$signal in
    begun* | started*) undo ;;
    switched)
      restore # not in a condition, which would disable set -e inside
      case $? in
        0) log "tag ${current:-latest} is running again" >&2 ;;
        *) log "restoring failed: check docker compose ps; .env names tag ${current:-latest}" >&2 ;;
      esac ;;
    switched*)
      step docker rm -f "${old[@]}"
      step rm -f .env.before
      log "tag $tag is running and checked, other services may be outdated: deploy again" >&2 ;;
  esac
  [ $code -eq 0 ] || [ -n "$signal" ] || code=1
  exit $code
}

main() {
  parse "$@"
  cd "$(dirname "$(readlink -f "$0")")"
  check_requirements
  choose_tag
  trap finish EXIT
  for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # expand $signal now
    trap "signal=$signal; exit $((128 + $(kill -l $signal)))" $signal
  done
  signal=''
  log "replacing tag ${current:-none} with tag $tag"
  transfer_image
  begin
  replace_containers
  update_services
  stage=''
  step rm .env.before
  remove_old_images
  [ -z "$host" ] || remove_old_images here
  log "tag $tag is running${dry:+ (dry run: nothing was changed)}"
}
main "$@"
