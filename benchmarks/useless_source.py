"""The demo with a second source that knows nothing: is it found out?

    python train.py --config=configs/digits_source.py --workdir=runs/demo/source
    python train.py --config=configs/digits_source.py --workdir=runs/untrained \
      --config.epochs=1 --config.optimizer.learning_rate=1e-9
    python -m l2t_jax.table --config=benchmarks/useless_source.py --seeds=10 \
      --methods=fm_one_to_one,fm_all_to_all,l2t_ww --workdir=runs/useless \
      --config.meta.learning_rate=1e-2

The 18 candidate pairs are those of the demo, and as many from a network with
random weights. The results are in benchmarks/RESULTS.md.
"""

from __future__ import annotations

from ml_collections import config_dict

from configs import default, digits


def get_config() -> config_dict.ConfigDict:
  config = digits.get_config()
  config.source.weights = ""
  for name, run in (("digits", "demo/source"), ("untrained", "untrained")):
    config.sources[name] = default.source()
    config.sources[name].weights = f"runs/{run}/target.safetensors"
  return config
