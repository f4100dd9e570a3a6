#!/usr/bin/env bash
# The step on one GPU against PyTorch's, in one command of under ten minutes.
#
#   benchmarks/step_time_gpu.sh [FOLDER [FLAG...]]
#
#   benchmarks/step_time_gpu.sh gpu_data                # precisions, seeds
#   benchmarks/step_time_gpu.sh gpu_data --sweep=mode   # then the other sweeps
#
# Wheels in FOLDER (*.whl) are installed first, without their dependencies: a
# machine that has jax, flax, optax, chex, orbax, torch, matplotlib and rich needs
# ml_collections, safetensors and tensorboardX. The plot goes to OUT, where that
# is set, or to runs/step_time_gpu. The table and the JSON object come last.
set -uo pipefail
FOLDER=${1:-}
cd "$(dirname "$0")/.." || exit
if [ -n "$FOLDER" ] && compgen -G "$FOLDER/*.whl" > /dev/null; then
  python -m pip install --quiet --no-deps "$FOLDER"/*.whl || exit
fi
timeout --kill-after=30 "${LIMIT:-560}" python -u -m benchmarks.step_time \
  --sweep=precision,seeds --folder="${OUT:-runs/step_time_gpu}" "${@:2}"
