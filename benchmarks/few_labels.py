"""STL-10 with 50 labels per class: the setting of `benchmarks.study`.

    --config=benchmarks/few_labels.py          VGG-9, as in the paper
    --config=benchmarks/few_labels.py:quarter  a quarter of its width

`python -m benchmarks.prepare_stl10` writes the images, the authors' split and
their source network to the folder local/. 500 of the 4,500 training images keep
their labels; all 500 validation and 8,000 test images are used.
"""

from __future__ import annotations

from flax import linen as nn
from ml_collections import config_dict

from configs import stl10
from l2t_jax.models import vgg


def quarter_vgg9(num_classes: int) -> nn.Module:
  """Return VGG-9 with a quarter of its channels."""
  plan = tuple(x if isinstance(x, str) else x // 4 for x in vgg.VGG9)
  return vgg.VGG(plan, num_classes)


def get_config(width: str = "full") -> config_dict.ConfigDict:
  config = stl10.get_config()
  config.data.source = "npz"
  config.data.path = "local/stl10_32.npz"
  config.data.split_file = "local/author_splits.npz"
  config.data.split_prefix = "stl10"
  config.data.per_class = 50
  config.source.weights = "local/tinyimagenet_resnet32.safetensors"
  if width == "quarter":
    config.target.model = "benchmarks.few_labels:quarter_vgg9"
  config.batch_size = 64
  config.log_every = 7  # An epoch.
  config.trackers = ()
  # The study evaluates the test images once per run, at its end.
  config.evaluate_test = False
  return config
