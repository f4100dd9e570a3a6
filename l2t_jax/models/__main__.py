"""List the taps of a network: python -m l2t_jax.models resnet32."""

from __future__ import annotations

import argparse

from rich import console, table

from l2t_jax import models


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("model", choices=list(models.MODELS))
  parser.add_argument(
    "--image_size", type=int, help="pixels (32; 224 for ImageNet networks)"
  )
  parser.add_argument("--channels", type=int, default=3)
  args = parser.parse_args()
  module = models.create(args.model, num_classes=10)
  size = args.image_size or module.image_size
  taps = models.tap_shapes(module, (size, size, args.channels))
  rows = table.Table(
    "tap",
    "height x width",
    "channels",
    "default",
    title=f"{args.model} at {size}x{size}",
  )
  for name, (height, width, channels) in taps.items():
    mark = "yes" if name in module.default_taps else ""
    rows.add_row(name, f"{height}x{width}", str(channels), mark)
  console.Console().print(rows)


if __name__ == "__main__":
  main()
