#!/usr/bin/env bash
# Several processes on this machine: launch/local.sh wsparse.train --config=configs/tiny.py
#
# PROCESSES         how many (default 2)
# DEVICES           CPU devices of each process, 0 for what the machine has (default 1)
# PYTHON            interpreter (default python)
# PORT              where process 0 waits for the others (default: a free one)

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
[[ $# -ge 1 ]] || usage

processes=${PROCESSES:-2} devices=${DEVICES:-1} python=${PYTHON:-python}
have "$python" "activate the virtual environment, or set PYTHON"
free='import socket; listener = socket.create_server(("127.0.0.1", 0)); print(listener.getsockname()[1])'
port=${PORT:-$("$python" -c "$free")}
# Without a bind address the coordinator would listen on all of the machine's addresses.
shared=(JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_COORDINATOR_BIND_ADDRESS="127.0.0.1:$port"
  JAX_NUM_PROCESSES="$processes")
if [[ $devices != 0 ]]; then
  shared+=(JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$devices")
fi

jobs=()
trap 'kill -TERM "${jobs[@]}" 2>/dev/null || true' INT TERM
for ((index = 0; index < processes; index++)); do
  command=(env "${shared[@]}" JAX_PROCESS_ID="$index" "$python" -m "$@")
  show "${command[@]}"
  [[ ${DRY_RUN:-0} != 1 ]] || continue
  # Not through a function: a signal must reach the program, not a shell around it.
  "${command[@]}" &
  jobs+=($!)
done
status=0
for job in ${jobs[@]+"${jobs[@]}"}; do
  code=0
  wait "$job" || code=$?
  # A signal ends the wait before the job, which is still saving.
  while kill -0 "$job" 2>/dev/null; do
    code=0
    wait "$job" || code=$?
  done
  [[ $code == 0 ]] || status=$code
done
exit "$status"
