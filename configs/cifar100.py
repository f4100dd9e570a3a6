"""CIFAR-100: the authors' TinyImageNet ResNet-32 -> VGG-9.

    python -m l2t_jax.pretrained tinyimagenet_resnet32.pth.tar \
      weights/tinyimagenet_resnet32.safetensors --model=resnet32
    python train.py --config=configs/cifar100.py --workdir=runs/cifar100

The paper reports 67.7 % from scratch, 70.0 % with one-to-one feature matching
and 71.0 % with l2t_ww (45,000 training and 5,000 validation images).
Not run with this code so far: 70,200 iterations need a GPU.
Preparing the tfds data set needs TensorFlow once; reading it does not.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.data.name = "cifar100"
  config.source.weights = "weights/tinyimagenet_resnet32.safetensors"
  return config
