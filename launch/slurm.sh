#!/usr/bin/env bash
# GPUs under Slurm.
#
#   launch/slurm.sh run MODULE [ARGUMENT ...]    python -m MODULE as one job over all GPUs
#   launch/slurm.sh sweep [ARGUMENT ...]         a job array of independent workers of wsparse.prune
#   launch/slurm.sh status | stop                what there is; end all jobs called NAME
#
# NAME              of the job (default wsparse)
# PARTITION ACCOUNT TIME    as sbatch takes them (default: the cluster's own)
# NODES GPUS        nodes, and GPUs of each (default 1 and 8); one process a GPU
# CPUS              cores of each process (default 8)
# WORKERS           of a sweep, one GPU each (default 8)
# PYTHON            interpreter on the nodes (default .venv/bin/python)
# LOGS              folder for what is printed (default logs)

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
[[ $# -ge 1 ]] || usage
verb=$1
shift

have sbatch "run this on a login node of the cluster"
logs=${LOGS:-logs}
# In the environment, since a comma would divide it in --export.
submit=(env PYTHON="${PYTHON:-.venv/bin/python}" sbatch)
# Two minutes before the end the processes are told, save, and the job queues again.
options=(--job-name="${NAME:-wsparse}" --cpus-per-task="${CPUS:-8}" --requeue --open-mode=append
  --signal=TERM@120 --export=ALL
  ${PARTITION:+--partition="$PARTITION"} ${ACCOUNT:+--account="$ACCOUNT"} ${TIME:+--time="$TIME"})

case $verb in
  run)
    [[ $# -ge 1 ]] || usage
    run mkdir -p "$logs"
    run "${submit[@]}" "${options[@]}" --nodes="${NODES:-1}" --ntasks-per-node="${GPUS:-8}" \
      --gpus-per-node="${GPUS:-8}" --output="$logs/%x-%j.out" "$here/slurm_job.sh" "$@"
    ;;
  sweep)
    run mkdir -p "$logs"
    run "${submit[@]}" "${options[@]}" --array="0-$((${WORKERS:-8} - 1))" --ntasks=1 --gpus=1 \
      --output="$logs/%x-%A_%a.out" "$here/slurm_job.sh" wsparse.prune "$@"
    ;;
  status) run squeue --me --name="${NAME:-wsparse}" ;;
  stop) run scancel --me --name="${NAME:-wsparse}" ;;
  *) usage ;;
esac
