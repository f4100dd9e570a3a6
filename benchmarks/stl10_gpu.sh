#!/usr/bin/env bash
# Rows of the STL-10 table on one GPU, in at most ten minutes a command.
#
#   benchmarks/stl10_gpu.sh FOLDER METHODS [WORKDIR [FLAG...]]
#
#   benchmarks/stl10_gpu.sh gpu_data scratch,fm_one_to_one
#   benchmarks/stl10_gpu.sh gpu_data l2t_ww
#
# FOLDER needs: stl10_32.npz (x_train, y_train, x_test, y_test in the official
# order, 32x32), author_splits.npz (stl10_train, stl10_val, stl10_test) and
# resnet32_tinyimagenet.safetensors (made by `python -m l2t_jax.pretrained`).
# Wheels in it (*.whl) are installed first, without their dependencies: a machine
# that has jax, flax, optax, chex, orbax, matplotlib and rich needs
# ml_collections, safetensors and tensorboardX, and neither tfds nor grain.
#
# A command that runs out of time (LIMIT seconds) stops at its last checkpoint;
# the same command goes on from there. Where WORKDIR does not outlive the
# command, set OUT to a folder that does: summaries and tables are copied there.
# FLAGs go to `l2t_jax.table`, such as --seeds=5 or --config.precision=tf32.
set -uo pipefail
FOLDER=$(realpath "$1") || exit
METHODS=$2
WORKDIR=$(realpath -m "${3:-runs/stl10_gpu}") || exit
cd "$(dirname "$0")/.." || exit
if compgen -G "$FOLDER/*.whl" > /dev/null; then
  python -m pip install --quiet --no-deps "$FOLDER"/*.whl || exit
fi
timeout --signal=INT --kill-after=30 "${LIMIT:-500}" \
  python -u -m l2t_jax.table --config=configs/stl10.py --workdir="$WORKDIR" \
  --methods="$METHODS" --seeds=3 \
  --config.data.source=npz --config.data.path="$FOLDER/stl10_32.npz" \
  --config.data.split_file="$FOLDER/author_splits.npz" \
  --config.data.split_prefix=stl10 \
  --config.source.weights="$FOLDER/resnet32_tinyimagenet.safetensors" \
  --config.checkpoint_every=5 "${@:4}"
status=$?
if [ -n "${OUT:-}" ]; then
  cp "$WORKDIR"/table.* "$OUT"/
  tar -C "$WORKDIR" -czf "$OUT/summaries.tar.gz" --exclude=checkpoints \
    --exclude=cache --exclude='*.safetensors' .
fi
cat "$WORKDIR/table.md"
exit $status
