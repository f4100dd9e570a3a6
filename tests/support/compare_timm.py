"""Compare converted networks of timm with timm, from uint8 images on.

    python -m tests.support.compare_timm resnet50 convnext_atto

needs an environment with this project, timm, torchax and matching builds of
torch and torchvision. Weights are random; images pass timm's own transform.
Prints a line for each network: the largest differences of its logits and of any
of its taps, each relative to the largest value.
"""

import pathlib
import sys
import tempfile

import numpy as np
from PIL import Image
import timm
import torch

from l2t_jax.models import convert_torch, programs
from l2t_jax.runtime import cpu_lowering

_TOLERANCE = 1e-5


def compare(name: str) -> tuple[float, float]:
  """Return the largest relative differences of the logits and of the taps."""
  torch.manual_seed(0)
  module = timm.create_model(name).eval()
  with tempfile.TemporaryDirectory() as folder:
    checkpoint = pathlib.Path(folder) / "random.pth"
    torch.save(module.state_dict(), checkpoint)
    network = convert_torch.from_timm(name, checkpoint, "", programs.Reading())
  config = timm.data.resolve_data_config({"crop_pct": 1.0}, model=module)
  transform = timm.data.create_transform(**config)
  size = network.image_size
  pixels = np.random.default_rng(0).integers(
    0, 256, (2, size, size, 3), np.uint8
  )
  images = torch.stack([transform(Image.fromarray(x)) for x in pixels])
  with torch.no_grad():
    logits = module(images)
    maps = module.forward_intermediates(
      images, output_fmt="NCHW", intermediates_only=True
    )
  functions = programs.to_functions(
    programs.export(network), network.params, network.taps
  )
  ours, features, _ = functions.apply(
    network.params, {}, pixels / np.float32(255), train=False
  )
  assert len(features) == len(maps)
  difference = lambda a, b: float(np.abs(a - b).max() / np.abs(b).max())
  return difference(ours, logits.numpy()), max(
    difference(x, y.permute(0, 2, 3, 1).numpy())
    for x, y in zip(features.values(), maps, strict=True)
  )


def main(names: list[str]) -> int:
  cpu_lowering.install()
  print(f"timm {timm.__version__}, torch {torch.__version__}")
  worst = 0.0
  for name in names:
    logits, taps = compare(name)
    print(f"{name}: logits {logits:.1e}, taps {taps:.1e}", flush=True)
    worst = max(worst, logits, taps)
  return int(worst > _TOLERANCE)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
