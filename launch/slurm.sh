#!/usr/bin/env bash
# Train one run on several nodes, with one process per GPU:
#   sbatch --nodes=2 launch/slurm.sh --config=configs/X.py --workdir=DIR ...
# Submit from the root of the project; DIR must be on a file system that all
# nodes share. Options of sbatch override the lines below, for example
# --gpus-per-node=4 --ntasks-per-node=4, or --gpus-per-node=0 without GPUs.
# Before the time limit, or when the job is preempted, the run saves and the job
# is requeued. It is also requeued when a process or a node is lost.
#SBATCH --job-name=l2t
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# If Slurm tracks processes with cgroups, its SIGTERM reaches only the shell of
# each task. The shell passes it on; it also interrupts `wait`, hence the loop.
# srun returns the highest exit code, which could come from a process that lost
# another one. Only the exit code of process 0, which writes all files, is
# meaningful, so the others return 0.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  "$@" & process=$!
  trap "kill -TERM $process 2>/dev/null" TERM
  while kill -0 "$process" 2>/dev/null; do wait "$process"; done
  wait "$process"
  code=$?
  ((code == 0)) || echo "process $SLURM_PROCID: exit code $code" >&2
  ((SLURM_PROCID == 0)) || exit 0
  exit "$code"
' _ "${PYTHON:-.venv/bin/python}" train.py --distributed "$@"
code=$?

# 75: asked to stop; 5: another process was lost; 137, 143: killed.
if [[ $code =~ ^(5|75|137|143)$ && ${SLURM_RESTART_COUNT:-0} -lt 20 ]]; then
  echo "exit code $code: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
