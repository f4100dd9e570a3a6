#!/usr/bin/env bash
# STL-10 in the paper's setting on one GPU, as many seeds as time allows.
#
#   benchmarks/gpu_stl10.sh FOLDER [WORKDIR [FLAG...]]
#
#   PRECISION=tf32 LIMIT=480 benchmarks/gpu_stl10.sh gpu_data
#   METHODS=lwf,at,lwf_at benchmarks/gpu_stl10.sh gpu_data
#
# FOLDER holds what `python -m benchmarks.prepare_stl10` writes, and wheels of
# what the machine lacks (benchmarks/gpu_packages.sh).
#
# One seed of every method first, then the next seed of each, up to SEEDS. A
# command that runs out of time (LIMIT seconds) saves after the iteration; the
# same command goes on from there. Where WORKDIR (runs/gpu_stl10) does not
# outlive the command, set OUT to a folder that does: results are copied there.
# FLAGs go to `l2t_jax.table`, such as --config.epochs=60.
set -uo pipefail
FOLDER=$(realpath "$1") || exit
WORKDIR=$(realpath -m "${2:-runs/gpu_stl10}") || exit
cd "$(dirname "$0")/.." || exit
. benchmarks/gpu_packages.sh
end=$((SECONDS + ${LIMIT:-480}))
for seeds in $(seq "${SEEDS:-3}"); do
  timeout --signal=TERM --kill-after=30 $((end > SECONDS ? end - SECONDS : 1)) \
    "$PYTHON" -u -m l2t_jax.table --config=configs/stl10.py \
    --workdir="$WORKDIR" --seeds="$seeds" --together=1 \
    --methods="${METHODS:-scratch,fm_one_to_one,l2t_ww}" \
    --config.precision="${PRECISION:-f32}" \
    --config.data.source=npz --config.data.path="$FOLDER/stl10_32.npz" \
    --config.data.split_file="$FOLDER/author_splits.npz" \
    --config.data.split_prefix=stl10 \
    --config.source.weights="$FOLDER/tinyimagenet_resnet32.safetensors" \
    --config.checkpoint_every=20 "${@:3}"
  status=$?
  [ $status -eq 0 ] || break
done
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  cp "$WORKDIR"/table.* "$OUT"/
  tar -C "$WORKDIR" -czf "$OUT/gpu_stl10.tar.gz" --exclude=checkpoints \
    --exclude=tensorboard --exclude='*.safetensors' .
fi
exit $status
