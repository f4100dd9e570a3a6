"""Stanford-40, actions, at 224x224: ImageNet ResNet-34 -> ResNet-18.

    python -m l2t_jax.data.archives stanford40 DOWNLOADS data/stanford40
    python -m l2t_jax.pretrained resnet34-b627a593.pth \
      weights/imagenet_resnet34.safetensors --model=resnet34
    python train.py --config=configs/stanford40.py --workdir=runs/stanford40

DOWNLOADS holds Stanford40_JPEGImages.zip and Stanford40_ImageSplits.zip. The
paper reports 36.9 % from scratch, 44.5 % with one-to-one feature matching and
63.1 % with l2t_ww, with a larger meta learning rate than elsewhere. The authors
published no split; ours takes 10 % of each class of the 4,000 training images
for validation: 3,600 and 400 images.
Not run with this code so far: 11,200 iterations need a GPU.
"""

from ml_collections import config_dict

from configs import mit67


def get_config() -> config_dict.ConfigDict:
  config = mit67.get_config()
  config.data.path = "data/stanford40"
  config.meta.learning_rate = 1e-3
  return config
