"""TinyImageNet at 32x32: a ResNet-32 from scratch, the source of the others.

    python -m l2t_jax.data.archives tinyimagenet DOWNLOADS data/tinyimagenet
    python train.py --config=configs/tinyimagenet.py --workdir=runs/tinyimagenet
    python train.py --config=configs/stl10.py --workdir=runs/stl10 \
      --config.source.weights=runs/tinyimagenet/target.safetensors

DOWNLOADS holds tiny-imagenet-200.zip; its 64x64 images are resized when they
are read, and its official validation images are the test images. The authors
published no script for this training, only its result: the network of epoch
104, which has an accuracy of 49.1 % here. That epoch suggests a first drop of
the learning rate at half of 200 epochs; the rest of the schedule is what is
usual for ResNets on small images. The validation share of 10 % of each class is
our choice: 90,000 training and 10,000 validation images.
Not run with this code so far: 140,600 iterations need a GPU.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.method = "scratch"
  config.data.source = "folder"
  config.data.path = "data/tinyimagenet"
  config.target.model = "resnet32"
  # The learning rate is divided by 10 after 50 % and 75 % of the epochs.
  config.optimizer.schedule = "step"
  return config
