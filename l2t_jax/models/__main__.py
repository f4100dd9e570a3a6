"""List the taps of a network, or of two networks with pairs of their taps.

    python -m l2t_jax.models resnet32
    python -m l2t_jax.models resnet32 --target=my_package.my_module:make
    python -m l2t_jax.models weights/convnext.safetensors

The column "default" marks the taps that are used if a config names none.
Outputs that cannot be tapped are listed with the reason. The pairs are those
of config.transfer.pairs=nearest.
"""

from __future__ import annotations

import argparse
import pathlib

from rich import console, table

from l2t_jax import errors, models
from l2t_jax.method import pair_sets
from l2t_jax.models import bundled, weight_files


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument(
    "model",
    help=f"{', '.join(bundled.MODELS)}, package.module:function, or a weight"
    " file",
  )
  parser.add_argument("--target", help="the target network of the pairs")
  parser.add_argument(
    "--image_size", type=int, help="side in pixels (32; 224 for ImageNet)"
  )
  parser.add_argument("--channels", type=int, default=3)
  return parser


def main(args: argparse.Namespace) -> None:
  """Print the taps of one network, or of two networks with their pairs."""
  default_taps = [
    _print_taps(model, args.image_size, args.channels)
    for model in (args.model, args.target)
    if model
  ]
  if args.target:
    for pair in pair_sets.make_pairs("nearest", *default_taps):
      print(pair.name)


def _print_taps(model, image_size, channels):
  """Print a network's taps; return the default ones."""
  if model.endswith(".safetensors"):
    loaded = weight_files.load_network(pathlib.Path(model))
    network = loaded.network
    image_size = int(loaded.metadata.get("image_size", 0)) or image_size
    channels = int(loaded.metadata.get("channels", channels))
  else:
    network = bundled.create(model, num_classes=10)  # Any number will do.
  size = image_size or bundled.image_size(network)
  shape = (size, size, channels)
  layout = models.trace(network, shape)
  default_taps = models.select_taps(layout)
  rows = table.Table(
    table.Column("tap", overflow="fold"),
    "height x width",
    "channels",
    "default",
    title=f"{model} at {size}x{size}",
  )
  for name, tap_shape in layout.taps.items():
    height, width, tap_channels = tap_shape
    mark = "yes" if name in default_taps else ""
    rows.add_row(name, f"{height}x{width}", str(tap_channels), mark)
  console.Console().print(rows)
  for reason in layout.untappable.values():
    print(reason)
  return default_taps


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
