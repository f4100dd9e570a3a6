# Sourced by the commands for a GPU: what they need beside the machine's packages.
#
# Wheels in FOLDER (*.whl) are put before them, without their dependencies: a
# machine that has jax, flax, optax, chex, orbax, torch, matplotlib, rich,
# safetensors, lazy-loader, pytest, pytest-xdist and hypothesis needs those of
# ml_collections and tensorboardX.
export PYTHON=${PYTHON:-python3}
if compgen -G "$FOLDER/*.whl" > /dev/null; then
  packages=$(mktemp -d)
  "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$packages" \
    "$FOLDER"/*.whl || exit
  export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
