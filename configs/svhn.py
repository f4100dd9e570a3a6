"""SVHN, house numbers: the authors' TinyImageNet ResNet-32 -> VGG-9.

    python -m l2t_jax.pretrained tinyimagenet_resnet32.pth.tar \
      weights/tinyimagenet_resnet32.safetensors --model=resnet32
    python train.py --config=configs/svhn.py --workdir=runs/svhn

Not in the paper's Table 1, but supported by the authors' code. Our split takes
10 % of each class of the 73,257 training images for validation: about 65,930
and 7,330 images. The 531,131 extra images are not used; digits are not
mirrored.
Not run with this code so far: 103,000 iterations need a GPU.
Preparing the tfds data set needs TensorFlow once; reading it does not.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.data.name = "svhn_cropped"
  config.data.augment = "crop"
  config.source.weights = "weights/tinyimagenet_resnet32.safetensors"
  return config
