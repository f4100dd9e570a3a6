#!/usr/bin/env bash
# Train one run in several processes of this machine, with a GPU for each:
#   launch/local.sh NUM_PROCESSES --config=configs/X.py --workdir=DIR ...
# Ends with the highest exit code of theirs; SIGTERM and Ctrl-C reach all.
set -uo pipefail
count=${1:?usage: launch/local.sh NUM_PROCESSES --config=... --workdir=...}
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket
with socket.socket() as free:
  free.bind(("localhost", 0))
  print(free.getsockname()[1])') || exit

processes=()
for ((i = 0; i < count; i++)); do
  CUDA_VISIBLE_DEVICES=$i "$python" train.py --coordinator="localhost:$port" \
    --num_processes="$count" --process_id="$i" "$@" &
  processes+=($!)
done
trap 'kill -TERM "${processes[@]}" 2>/dev/null' TERM INT

status=0
for process in "${processes[@]}"; do
  wait "$process"
  code=$?
  # A signal ends a wait, not the process.
  while ((code > 128)) && kill -0 "$process" 2>/dev/null; do
    wait "$process"
    code=$?
  done
  status=$((code > status ? code : status))
done
exit "$status"
