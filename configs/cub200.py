"""CUB-200-2011 at 224x224: torchvision's ImageNet ResNet-34 -> ResNet-18.

    python -m l2t_jax.pretrained resnet34-b627a593.pth \
      weights/imagenet_resnet34.safetensors --model=resnet34
    python train.py --config=configs/cub200.py --workdir=runs/cub200

The paper reports 42.2 % from scratch, 48.9 % with one-to-one feature matching
and 65.1 % with l2t_ww (4,994 training and 1,000 validation images). A folder
with one subfolder per class works as well: --config.data.source=folder
--config.data.path=FOLDER.
Not run with this code so far: it needs a GPU.
Preparing the tfds data set needs TensorFlow once; reading it does not.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  # The other experiments at 224x224 start from this one.
  config = default.get_config()
  config.batch_size = 64
  config.data.name = "caltech_birds2011"
  config.data.image_size = 224
  config.data.augment = "random_resized_crop_flip"
  # The share of the authors' split: 1,000 of 5,994.
  config.data.val_fraction = 1000 / 5994
  config.source.weights = "weights/imagenet_resnet34.safetensors"
  config.target.model = "resnet18"
  return config
