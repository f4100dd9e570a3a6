"""Stanford Dogs at 224x224: torchvision's ImageNet ResNet-34 -> ResNet-18.

    python -m l2t_jax.pretrained resnet34-b627a593.pth \
      weights/imagenet_resnet34.safetensors --model=resnet34
    python train.py --config=configs/dogs.py --workdir=runs/dogs

The paper reports 58.1 % from scratch, 67.3 % with one-to-one feature matching
and 78.1 % with l2t_ww (10,800 training and 1,200 validation images: 90 and 10
per class, as here, but other ones). A folder with one subfolder per class works
as well: --config.data.source=folder --config.data.path=FOLDER.
Not run with this code so far: 33,600 iterations need a GPU.
Preparing the tfds data set needs TensorFlow once; reading it does not.
"""

from ml_collections import config_dict

from configs import cub200


def get_config() -> config_dict.ConfigDict:
  config = cub200.get_config()
  config.data.name = "stanford_dogs"
  config.data.val_fraction = 0.1
  return config
