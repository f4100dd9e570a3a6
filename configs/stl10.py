"""STL-10 at 32x32: the authors' TinyImageNet ResNet-32 -> VGG-9.

    python -m l2t_jax.pretrained tinyimagenet_resnet32.pth.tar \
      weights/tinyimagenet_resnet32.safetensors --model=resnet32
    python train.py --config=configs/stl10.py --workdir=runs/stl10

The paper reports 65.2 % from scratch, 76.4 % with one-to-one feature matching
and 78.3 % with l2t_ww (test accuracy at the best validation epoch, 4,500
training and 500 validation images). The authors' split needs an npz file in the
official order (tfds shuffles):
--config.data.split_file=FILE.npz --config.data.split_prefix=stl10.
Measured with this code, one seed, on an NVIDIA H200 (benchmarks/gpu_stl10.sh
with PRECISION=tf32): 67.0 % from scratch in 37 s and 78.5 % with l2t_ww in
169 s, without compiling (benchmarks/RESULTS.md). On 2 CPU cores each of the
7,000 iterations takes 4 to 16 s.
Preparing the tfds data set needs TensorFlow once; reading it does not.
"""

from ml_collections import config_dict

from configs import default


def get_config() -> config_dict.ConfigDict:
  config = default.get_config()
  config.data.name = "stl10"
  config.source.weights = "weights/tinyimagenet_resnet32.safetensors"
  return config
