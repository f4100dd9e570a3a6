"""CIFAR-100: the authors' ResNet-32 -> a ConvNeXt, with its usual recipe.

    python train.py --config=configs/cifar100_convnext.py \
      --workdir=runs/cifar100_convnext

The recipe is that of configs/cifar100_vit.py with the learning rate of Liu et
al., CVPR 2022. See configs/cifar100.py for how to get the source.
"""

from ml_collections import config_dict

from configs import cifar100_vit


def get_config() -> config_dict.ConfigDict:
  config = cifar100_vit.get_config()
  config.target.model = "convnext_atto"
  config.optimizer.learning_rate = 1.25e-4  # 4e-3 per 4,096 images.
  config.optimizer.warmup_epochs = 20.0
  return config
