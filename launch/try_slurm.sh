#!/usr/bin/env bash
# Test launch/slurm.sh, and a table as a job array, with Slurm on this machine:
#   launch/try_slurm.sh
# Needs root on Debian, where it installs slurm-wlm and munge if they are
# missing; it does not change the settings of an installed Slurm. Logs and runs
# are left in runs/slurm. The daemons are stopped at the end. If something
# differs from docs/guides/clusters.md, it says what and exits with 1. It takes
# about 15 minutes on two busy cores.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$PWD/runs/slurm
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
export JAX_NUM_CPU_DEVICES=1 JAX_DISABLE_MOST_OPTIMIZATIONS=1

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# Wait until a command succeeds.
wait_until() {
  local end=$((SECONDS + 900))
  until "$@"; do
    ((SECONDS < end)) || fail "not within 15 minutes: $*"
    sleep 0.2
  done
}

start_slurm() {
  command -v slurmctld slurmd munged > /dev/null ||
    { apt-get update -qq && apt-get install -qq -y slurm-wlm munge; }
  mkdir -p "$folder"/{state,spool}
  (umask 077 && head -c 128 /dev/urandom > "$folder/munge.key")
  # Four CPUs, whatever the machine has. Jobs of `urgent` preempt others.
  cat > "$SLURM_CONF" << END
ClusterName=try
SlurmctldHost=$host
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host CPUs=4
PartitionName=normal Nodes=$host Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$host PriorityTier=2
END
  munged --force --key-file="$folder/munge.key" \
    --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
    2> /dev/null
  slurmctld
  slurmd
  wait_until is_idle
}

is_idle() { [[ $(sinfo --noheader --partition=normal --format=%T) == idle ]]; }

stop_slurm() {
  if runs slurmctld; then
    scancel --user=root
    timeout 60 bash -c 'while [[ $(squeue --noheader) ]]; do sleep 1; done' ||
      echo "jobs are left: $(squeue --noheader)" >&2
  fi
  local name
  for name in slurmctld slurmd munged; do
    if runs "$name"; then
      pkill --exact --pidfile "$folder/$name.pid" "$name"
      timeout 60 bash -c "while [[ -e $folder/$name.pid ]]; do sleep 1; done" ||
        echo "$name does not stop" >&2
    fi
  done
}

# True if our daemon is running. Its PID may have been reused, hence the name.
runs() { pgrep --exact --pidfile "$folder/$1.pid" "$1" &> /dev/null; }

# Submit a run of two processes: submit NAME [SBATCH_OPTION ...] [-- FLAG ...]
submit() {
  local name=$1 options=()
  shift
  while (($#)) && [[ $1 != -- ]]; do options+=("$1") && shift; done
  sbatch --parsable --nodes=1 --gpus-per-node=0 --ntasks-per-node=2 \
    --cpus-per-task=1 --time=60 --output="$folder/$name.log" "${options[@]}" \
    launch/slurm.sh --config=configs/digits.py "${@:2}" --config.epochs=100 \
    --config.batch_size=20 --config.bilevel.num_inner_steps=1 \
    --config.data.val_fraction=0.02 --config.data.test_fraction=0.02 \
    --config.source.weights="$folder/source/target.safetensors" \
    --config.checkpoint_every=1 --config.log_every=1 --workdir="$folder/$name"
}

has_state() { [[ $(scontrol show job "$1" -o) == *" JobState=$2 "* ]]; }

num_records() { cat "$folder/$1/metrics.jsonl" 2> /dev/null | wc -l; }

has_records() { (($(num_records "$1") >= $2)); }

# Print the PID of a process of a run: process_of NAME INDEX
process_of() {
  local pid
  for pid in $(pgrep -fx "[^ ]*python train.py .*/$1"); do
    ! grep -qzx "SLURM_PROCID=$2" "/proc/$pid/environ" || echo "$pid"
  done
}

# Faults that disturb the run `disturbed`; $1 is its job.
kill_process_0() { kill -KILL "$(process_of disturbed 0)"; }
kill_process_1() { kill -KILL "$(process_of disturbed 1)"; }
# With cgroups, Slurm signals only these shells.
terminate_shells() {
  kill -TERM "$(ps -o ppid= "$(process_of disturbed 0)")" \
    "$(ps -o ppid= "$(process_of disturbed 1)")"
}
preempt() {
  sbatch --partition=urgent --ntasks=4 --output=/dev/null --wrap="sleep 1"
}
# Set a time limit less than two minutes ahead: Slurm sends SIGTERM at once.
reach_time_limit() {
  local start
  start=$(date -d "$(squeue --noheader --jobs="$1" --format=%S)" +%s)
  scontrol update "jobid=$1" \
    timelimit=$((($(date +%s) - start) / 60 + 2))
}

[[ $(id -u) == 0 ]] || fail "must be run as root"
stop_slurm 2> /dev/null
rm -rf "$folder"
trap stop_slurm EXIT
start_slurm
slurmctld -V

echo "== Wrong input: not queued again"
job=$(submit wrong -- --config.method=none)
.venv/bin/python train.py --config=configs/digits_source.py \
  --workdir="$folder/source" --config.epochs=1 > "$folder/source.log"
wait_until has_state "$job" FAILED
cat "$folder/wrong.log"
[[ $(scontrol show job "$job") == *"Restarts=0"*"ExitCode=2:0"* ]] ||
  fail "wrong input must end with code 2 and without a new start"

echo "== Two jobs of two processes each, at once; one of them is disturbed"
undisturbed=$(submit undisturbed --partition=urgent)
job=$(submit disturbed)
for fault in kill_process_0 kill_process_1 terminate_shells reach_time_limit \
  preempt; do
  wait_until has_records disturbed $(($(num_records disturbed) + 5))
  [[ $fault != preempt ]] || wait_until has_state "$undisturbed" COMPLETED
  echo "after $(num_records disturbed) records: $fault"
  "$fault" "$job" > /dev/null
  wait_until has_state "$job" PENDING
  # Slurm would wait for two minutes before the next start. A few seconds are
  # needed, because it rejects a credential from the second in which the
  # previous start ended.
  scontrol update "jobid=$job" starttime=now+5seconds timelimit=60
done
wait_until has_state "$undisturbed" COMPLETED
wait_until has_state "$job" COMPLETED
cat "$folder/undisturbed.log" "$folder/disturbed.log"
[[ $(grep "queued again" "$folder/disturbed.log") == \
"exit code 137: queued again
exit code 5: queued again
exit code 75: queued again
exit code 75: queued again
exit code 75: queued again" ]] || fail "other exit codes than expected"
(($(grep -c "^resuming after" "$folder/disturbed.log") == 5)) ||
  fail "a start did not resume"
grep -q '"device": "2 x' "$folder/undisturbed/summary.json" ||
  fail "the two processes were not one run"
for file in metrics.jsonl transfer_map.json; do
  cmp "$folder"/{undisturbed,disturbed}/$file
done
.venv/bin/python - "$folder"/{undisturbed,disturbed}/target.safetensors << 'END'
import sys
import numpy as np
from safetensors import numpy
ours, theirs = (numpy.load_file(path) for path in sys.argv[1:])
assert ours.keys() == theirs.keys()
for name in ours:
  np.testing.assert_array_equal(ours[name], theirs[name])
print(f"{len(ours)} arrays, the metrics and the transfer map are bit-equal")
END

echo "== The guide's table; a share is asked to stop, and then run again"
mkdir "$folder/project"
ln -s "$PWD"/{.venv,configs,l2t_jax} "$folder/project"
command=$(sed -n '/^sbatch --array/,/^```/p' docs/guides/clusters.md | sed '$d')
echo "$command"
cd "$folder/project"
submit_table() { bash -c "$command" | grep -o '[0-9]*$'; }
job=$(submit_table)
wait_until test -e runs/table/digits/scratch/seed1/.lock
scancel --batch --signal=TERM "${job}_2"
wait_until has_state "${job}_1" COMPLETED
wait_until has_state "${job}_2" FAILED
[[ $(scontrol show job "${job}_2") == *"ExitCode=75:0"* ]] ||
  fail "a share that is asked to stop must end with code 75"
job=$(submit_table)
wait_until has_state "${job}_1" COMPLETED
wait_until has_state "${job}_2" COMPLETED
tail -n 20 slurm-*.out
cat runs/table/table.csv
grep -q "^scratch,digits,2," runs/table/table.csv || fail "a run is missing"
echo "All is as the guide says."
