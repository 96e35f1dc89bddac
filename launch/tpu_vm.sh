#!/usr/bin/env bash
# A Cloud TPU slice (or several) as a queued resource: create, set up, run, babysit, delete.
#
#   launch/tpu_vm.sh create                      ask for the slice, and wait for it
#   launch/tpu_vm.sh setup                       code, packages and the bucket on every host
#   launch/tpu_vm.sh run MODULE [ARGUMENT ...]   python -m MODULE on every host, e.g. wsparse.doctor
#   launch/tpu_vm.sh babysit MODULE [ARGUMENT ...]
#                                                all of it, again after each preemption, until it is done
#   launch/tpu_vm.sh status | delete             what there is; end it, and its costs
#
# NAME ZONE TYPE    of the resource, e.g. sparse europe-west4-b v5litepod-16
# PROJECT           Google Cloud project (default: gcloud's own)
# SLICES            how many slices (default 1)
# SPOT              1 for spot capacity, cheaper and preempted at any time (default 1)
# RUNTIME           software version (default v2-alpha-tpuv5-lite; v2-alpha-tpuv5, v2-alpha-tpuv6e, ...)
# BUCKET            mounted as bucket/ on every host: give --workdir=bucket/NAME to what is run
# POLL              seconds between looks (default 60)
# ATTEMPTS          how often babysit begins again (default 100)

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
[[ $# -ge 1 ]] || usage
verb=$1
shift

need NAME "of the queued resource"
need ZONE "where the TPU type is offered: https://cloud.google.com/tpu/docs/regions-zones"
have gcloud "https://cloud.google.com/sdk/docs/install"
slices=${SLICES:-1} poll=${POLL:-60}
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
tpus=(gcloud compute tpus)
nodes=("$NAME")
if [[ $slices -gt 1 ]]; then
  nodes=()
  for ((index = 0; index < slices; index++)); do nodes+=("$NAME-$index"); done
fi

create() {
  need TYPE "of the accelerator, e.g. v5litepod-16"
  local request=("${tpus[@]}" queued-resources create "$NAME" "${where[@]}"
    --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}")
  if [[ $slices -gt 1 ]]; then
    request+=(--node-count="$slices" --node-prefix="$NAME")
  else
    request+=(--node-id="$NAME")
  fi
  if [[ ${SPOT:-1} == 1 ]]; then request+=(--spot); fi
  run "${request[@]}" && await
}

state() {
  "${tpus[@]}" queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
}

await() {
  [[ ${DRY_RUN:-0} != 1 ]] || return 0
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        printf 'error: the request is %s: launch/tpu_vm.sh delete, then create\n' "$now" >&2
        return 1
        ;;
    esac
    printf '%s: %s\n' "$NAME" "$now"
    sleep "$poll"
  done
  [[ $now == ACTIVE ]]
}

# everywhere COMMAND: on every host of every slice at once.
everywhere() {
  local jobs=() job status=0 node
  for node in "${nodes[@]}"; do
    run "${tpus[@]}" tpu-vm ssh "$node" "${where[@]}" --worker=all --command="$1" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || status=$?; done
  return "$status"
}

# Parts are joined by && throughout: under babysit's if, bash would go on after a part that failed.
setup() {
  local folder
  folder=$(mktemp -d)
  run tar -czf "$folder/wsparse.tar.gz" -C "$here/.." --exclude=.git --exclude=.venv --exclude=runs . &&
    copy "$folder/wsparse.tar.gz" &&
    everywhere "mkdir -p wsparse && tar -xzf wsparse.tar.gz -C wsparse \
&& bash wsparse/launch/tpu_host.sh $(quoted "${BUCKET:-}")"
  local status=$?
  rm -rf "$folder"
  return "$status"
}

copy() {
  local node
  for node in "${nodes[@]}"; do
    run "${tpus[@]}" tpu-vm scp "$1" "$node:wsparse.tar.gz" "${where[@]}" --worker=all || return
  done
}

train() {
  [[ $# -ge 1 ]] || usage
  everywhere "cd wsparse && exec .venv/bin/python -m $(quoted "$@")"
}

delete() {
  run "${tpus[@]}" queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

# What a lost connection left running keeps the chips until it has saved, or is killed. The brackets keep
# pkill from finding this line.
clear_hosts() {
  local left="-f '[.]venv/bin/python -m wsparse'"
  everywhere "pkill -TERM $left; \
for second in \$(seq 180); do pgrep $left >/dev/null || exit 0; sleep 1; done; \
pkill -KILL $left; sleep 5; true"
}

obtain() {
  if [[ $1 == NONE ]]; then create; else await; fi
}

babysit() {
  [[ $# -ge 1 ]] || usage
  need BUCKET "or what a preempted slice had saved is lost"
  local attempt now=NONE failures=0
  for ((attempt = 1; attempt <= ${ATTEMPTS:-100}; attempt++)); do
    printf '%s: attempt %s\n' "$NAME" "$attempt"
    if [[ ${DRY_RUN:-0} != 1 ]]; then now=$(state 2>/dev/null) || now=NONE; fi
    case $now in
      FAILED | SUSPENDED | SUSPENDING)
        delete
        now=NONE failures=0
        ;;
    esac
    if obtain "$now" && setup && clear_hosts && train "$@"; then
      printf '%s: done; launch/tpu_vm.sh delete ends the costs\n' "$NAME"
      return 0
    fi
    # A slice that is still there was not taken away: what fails on it again and again is a mistake.
    if now=$(state 2>/dev/null) && [[ $now == ACTIVE ]] && ((++failures >= 3)); then
      printf 'error: failed 3 times on a healthy slice, which still costs: see above, or delete\n' >&2
      return 1
    fi
    sleep "$poll"
  done
  printf 'error: %s attempts were not enough\n' "${ATTEMPTS:-100}" >&2
  return 1
}

case $verb in
  create | setup | delete | babysit) "$verb" "$@" ;;
  run) train "$@" ;;
  status) run "${tpus[@]}" queued-resources describe "$NAME" "${where[@]}" ;;
  *) usage ;;
esac
