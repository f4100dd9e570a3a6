#!/usr/bin/env bash
# Train one run in several processes of this machine, with a GPU for each:
#   launch/local.sh NUM_PROCESSES --config=configs/X.py --workdir=DIR ...
# SIGTERM and Ctrl-C reach all. Ends with the code of the process that failed by
# itself, if one did, and not with those of processes that lost it (5).
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
  # A signal ends a wait, not the process.
  while ((code > 128)) && kill -0 "$process" 2>/dev/null; do
    wait "$process"
    code=$?
  done
  if ((code && (status == 0 || status == 5))); then status=$code; fi
done
exit "$status"
