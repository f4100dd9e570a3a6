"""List the taps of a network.

python -m l2t_jax.models resnet32
python -m l2t_jax.models my_package.my_module:make --image_size=224
"""

from __future__ import annotations

import argparse
import sys

from rich import console, table

from l2t_jax import models, types


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "model",
    help=f"{', '.join(models.MODELS)}, or package.module:function",
  )
  parser.add_argument(
    "--image_size", type=int, help="pixels (32; 224 for ours for ImageNet)"
  )
  parser.add_argument("--channels", type=int, default=3)
  args = parser.parse_args()
  try:
    _print_taps(args.model, args.image_size, args.channels)
  except types.InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _print_taps(model, image_size, channels):
  network = models.create(model, num_classes=10)
  size = image_size or models.image_size(network)
  shape = (size, size, channels)
  taps = models.tap_shapes(network, shape)
  chosen = models.select_taps(network, shape)
  rows = table.Table(
    table.Column("tap", overflow="fold"),
    "height x width",
    "channels",
    "default",
    title=f"{model} at {size}x{size}",
  )
  for name, (height, width, channels) in taps.items():
    mark = "yes" if name in chosen else ""
    rows.add_row(name, f"{height}x{width}", str(channels), mark)
  console.Console().print(rows)


if __name__ == "__main__":
  main()
