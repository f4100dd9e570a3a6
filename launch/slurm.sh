#!/usr/bin/env bash
# Train one run on several nodes, with a process for each GPU:
#   sbatch --nodes=2 launch/slurm.sh --config=configs/X.py --workdir=DIR ...
# Submit from the root of the project; DIR must be on a file system that all
# nodes share. Before the time is up, or when the job is preempted, the run saves
# and the job is queued again; so it is when a node is lost.
#SBATCH --job-name=l2t
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" train.py --distributed "$@"
code=$?
# 75: asked to stop; 5: another process was lost; 137, 143: killed.
case $code in
  5 | 75 | 137 | 143)
    echo "exit code $code: queued again"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
esac
exit "$code"
