"""MIT-67, indoor scenes, at 224x224: ImageNet ResNet-34 -> ResNet-18.

    python -m l2t_jax.data.archives mit67 DOWNLOADS data/mit67
    python -m l2t_jax.pretrained resnet34-b627a593.pth \
      weights/imagenet_resnet34.safetensors --model=resnet34
    python train.py --config=configs/mit67.py --workdir=runs/mit67

DOWNLOADS holds indoorCVPR_09.tar, TrainImages.txt and TestImages.txt. The paper
reports 48.9 % from scratch, 54.9 % with one-to-one feature matching and 64.9 %
with l2t_ww. The authors published no split; ours takes 10 % of each class of
the 5,360 training images for validation: 4,824 and 536 images.
Not run with this code so far: 15,000 iterations need a GPU.
"""

from ml_collections import config_dict

from configs import cub200


def get_config() -> config_dict.ConfigDict:
  config = cub200.get_config()
  config.data.source = "folder"
  config.data.name = ""
  config.data.path = "data/mit67"
  config.data.val_fraction = 0.1
  return config
