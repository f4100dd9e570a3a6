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

# srun returns the highest code, which may be that of a process that lost
# another; process 0, which alone writes, knows best.
export CODE_FILE=$PWD/.exit_code.$SLURM_JOB_ID
rm -f "$CODE_FILE"
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  "$@"; code=$?
  [[ $SLURM_PROCID != 0 ]] || echo "$code" > "$CODE_FILE"
  exit "$code"
' _ "${PYTHON:-.venv/bin/python}" train.py --distributed "$@"
code=$(cat "$CODE_FILE" 2>/dev/null || echo 137)
rm -f "$CODE_FILE"

# 75: asked to stop; 5: another process was lost; 137, 143: killed.
if [[ $code =~ ^(5|75|137|143)$ && ${SLURM_RESTART_COUNT:-0} -lt 20 ]]; then
  echo "exit code $code: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
