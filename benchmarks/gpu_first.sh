#!/usr/bin/env bash
# A first look at a GPU, in one command of at most eight minutes: the authors'
# numbers in float64, a training run, and the step against PyTorch's.
#
#   benchmarks/gpu_first.sh FOLDER [FLAG...]
#
#   benchmarks/gpu_first.sh gpu_data
#   PARTS=steps benchmarks/gpu_first.sh gpu_data --precision=bf16 --sweep seeds=3
#
# FOLDER is that of benchmarks/gpu_stl10.sh. FLAGs go to `benchmarks.step_time`.
# What was measured is in OUT (runs/gpu_first by default): a log, the JSON object
# and a plot. Each of the PARTS has a limit in seconds, multiplied by PATIENCE; one
# that fails or is cut stops no other. On a GPU on which nothing was compiled yet,
# each precision of the steps takes about two minutes, most of it to choose among
# cuDNN's kernels.
set -uo pipefail
FOLDER=$(realpath "$1") || exit
export OUT=${OUT:-runs/gpu_first} PYTHONUNBUFFERED=1
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/l2t_jax}
cd "$(dirname "$0")/.." && mkdir -p "$OUT" || exit
. benchmarks/gpu_packages.sh

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) start=$SECONDS status
  shift 2
  echo "== $name (at most $limit s)"
  timeout --signal=TERM --kill-after=30 "$limit" "$@"
  status=$?
  echo "== $name: exit code $status after $((SECONDS - start)) s"
}

versions() {
  part versions 60 "$PYTHON" -c 'import importlib.metadata as m, jax
print(jax.devices(), {p: m.version(p) for p in
  "jax jaxlib flax optax chex orbax-checkpoint numpy torch".split()})'
}

parity() {
  # Choosing the fastest kernels takes long, and is of no use to two iterations.
  XLA_FLAGS=--xla_gpu_autotune_level=0 part parity 75 "$PYTHON" -m pytest -n 0 \
    tests/test_parity.py -k "T2-linearized"
}

training() {
  part training 75 env LIMIT=$((70 * ${PATIENCE:-1})) METHODS=scratch SEEDS=1 \
    PRECISION="${PRECISION:-tf32}" benchmarks/gpu_stl10.sh "$FOLDER"
}

steps() {
  part steps 240 "$PYTHON" -m benchmarks.step_time --profile \
    --peers=contiguous,channels-last,authors --folder="$OUT" "$@"
}

for name in ${PARTS:-versions parity training steps}; do
  "$name" "${@:2}"
done 2>&1 | tee "$OUT/gpu_first.log" | cut -c 1-300
