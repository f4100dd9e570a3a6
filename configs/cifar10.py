"""CIFAR-10: the authors' TinyImageNet ResNet-32 -> VGG-9.

    python -m l2t_jax.pretrained tinyimagenet_resnet32.pth.tar \
      weights/tinyimagenet_resnet32.safetensors --model=resnet32
    python train.py --config=configs/cifar10.py --workdir=runs/cifar10

The paper uses it with few labelled images, N per class:
--config.data.per_class=N. We do not have the accuracies that it reports.
There are 45,000 training and 5,000 validation images. The authors published no
split; without one their code draws 10 % of each class, as ours does.
Not run with this code so far: 70,200 iterations need a GPU.
Preparing the tfds data set needs TensorFlow once; reading it does not.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.data.name = "cifar10"
  config.source.weights = "weights/tinyimagenet_resnet32.safetensors"
  return config
