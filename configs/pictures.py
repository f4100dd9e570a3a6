"""Few photographs per class, in a folder: where to start with your own.

    pip install '.[timm]'
    python -m l2t_jax.pretrained timm:convnext_tiny.fb_in1k source.safetensors
    python train.py --config=configs/pictures.py --workdir=runs/pictures

The folder pictures has a subfolder per class; docs/guides/data.md has other
layouts and formats. --config.data.path and --config.source.weights name other
places. Source features are scaled, because networks differ by orders of
magnitude in theirs. What suits your images best only a comparison can tell
(docs/guides/comparing.md).
Only tried on random images so far: photographs at this size need a GPU.
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
  # Best for almost all methods with few labels of STL-10.
  config.optimizer.learning_rate = 0.03
  # There, the paper's 1e-4 left the weights where they started. With this they
  # move, though the accuracy hardly changed.
  config.meta.learning_rate = 1e-3
  return config
