#!/usr/bin/env bash
# Train one run in several processes on this machine, with one GPU per process:
#   launch/local.sh NUM_PROCESSES --config=configs/X.py --workdir=DIR ...
# SIGTERM and Ctrl-C are passed on to all processes. If a process fails, its
# exit code is returned, and not the 5 of the processes that lost it.
set -uo pipefail
count=${1:?usage: launch/local.sh NUM_PROCESSES --config=... --workdir=...}
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket
with socket.socket() as free:
  free.bind(("localhost", 0))
  print(free.getsockname()[1])') || exit

IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
processes=()
for ((i = 0; i < count; i++)); do
  CUDA_VISIBLE_DEVICES=${gpus[i]:-} "$python" train.py --coordinator="localhost:$port" \
    --num_processes="$count" --process_id="$i" "$@" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT

status=0
for process in "${processes[@]}"; do
  wait "$process"
  code=$?
  # A signal interrupts `wait`, but does not end the process.
  while ((code > 128)) && kill -0 "$process" 2>/dev/null; do
    wait "$process"
    code=$?
  done
  if ((code && (status == 0 || status == 5))); then status=$code; fi
done
exit "$status"
