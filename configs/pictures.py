"""Few photographs per class, in a folder: where to start with your own.

    pip install '.[timm]'
    python -m l2t_jax.pretrained timm:convnext_tiny.fb_in1k source.safetensors
    python train.py --config=configs/pictures.py --workdir=runs/pictures

The folder pictures has a subfolder per class; docs/guides/data.md has other
layouts and formats. --config.data.path and --config.source.weights name other
places. Source features are scaled, so that `transfer.beta` suits
any source. What suits your images best only a comparison can tell
(docs/guides/comparing.md).
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.epochs = 100
  config.batch_size = 32
  config.data.source = "folder"
  config.data.path = "pictures"
  config.data.image_size = 224
  config.data.augment = "random_resized_crop_flip"
  config.source.weights = "source.safetensors"
  config.target.model = "resnet18"
  config.transfer.feature_scale = "std"
  # With few labels of STL-10, 0.03 was best for almost all methods, and 1e-4,
  # the default, left the weights of the transfer where they started.
  config.optimizer.learning_rate = 0.03
  config.meta.learning_rate = 1e-3
  return config
