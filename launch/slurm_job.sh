#!/usr/bin/env bash
# What launch/slurm.sh submits: python -m "$@" in every task, and again after it was told to stop.

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
status=0
# Since Slurm 22.05 srun does not take over how many cores a task of the job has.
srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$PYTHON" -m "$@" || status=$?
# 128 + SIGTERM: it has saved, and the time is up or the node is wanted.
if [[ $status == 143 ]]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
fi
exit "$status"
