"""CIFAR-100: the authors' ResNet-32 -> a ViT, with its usual recipe.

    python train.py --config=configs/cifar100_vit.py --workdir=runs/cifar100_vit

The recipe follows DeiT (Touvron et al., ICML 2021): AdamW with warm-up, mixup
and CutMix, RandAugment, random erasing, label smoothing and a moving average of
the weights; without stochastic depth and repeated augmentation.
See configs/cifar100.py for how to get the source.
"""

from ml_collections import config_dict

from configs import cifar100


def get_config() -> config_dict.ConfigDict:
  config = cifar100.get_config()
  config.target.model = "vit_tiny"
  config.target.label_smoothing = 0.1
  config.data.update(
    rand_augment=2,
    random_erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
  )
  config.optimizer.update(
    name="adamw",
    learning_rate=1.25e-4,  # 5e-4 per 512 images.
    warmup_epochs=5.0,
    weight_decay=0.05,
    decayed="kernels",
    ema_decay=0.9998,  # For 70,000 iterations.
  )
  # With scaled features, the default β of the matching loss suits any target.
  config.transfer.feature_scale = "std"
  return config
