"""The demo's source: a small ResNet on scikit-learn's digits.

    python train.py --config=configs/digits_source.py --workdir=runs/demo/source

The data are 1,797 digits of 8x8 pixels, enlarged to 16x16, which come with
scikit-learn (no download). Half a minute on 2 CPU cores; accuracies of 98.3 %
on validation and 98.9 % on test images.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.method = "scratch"
  config.epochs = 15
  config.batch_size = 32
  config.data.source = "bundled"
  config.data.name = "digits"
  config.data.image_size = 16
  config.data.channels = 1
  config.data.mean = (0.1307,)
  config.data.std = (0.3081,)
  config.data.augment = "crop"
  config.data.crop_padding = 3
  config.data.test_fraction = 0.1
  config.target.model = "resnet_tiny"
  config.checkpoint_every = config.epochs
  return config
