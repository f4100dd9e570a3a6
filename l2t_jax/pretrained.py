"""Source weights: from PyTorch checkpoints to a file that training reads.

    python -m l2t_jax.pretrained IN.pth OUT.safetensors --model=resnet32

The result is a safetensors file: plain arrays, no code, no torch. A tensor
"params/block1/conv1/kernel" of it is that leaf of the Flax variables; its
metadata hold the model's name, the number of classes and where it came from.

Submodules are named as in PyTorch, but for the dot before a number:
"blocks2.0.bn1.running_mean" is "batch_stats/blocks2_0/bn1/mean".
"""

from __future__ import annotations

import argparse
import pathlib

from l2t_jax import errors, models
from l2t_jax.models import torch_weights


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument(
    "checkpoint", type=pathlib.Path, help=".pth, .pt, .tar or .safetensors"
  )
  parser.add_argument("output", type=pathlib.Path, help="OUT.safetensors")
  parser.add_argument("--model", required=True, choices=list(models.MODELS))
  return parser


def main(args: argparse.Namespace) -> None:
  """Convert a checkpoint, and list what became of its tensors."""
  report = torch_weights.convert_file(args.checkpoint, args.output, args.model)
  for name, new_name in report.mapped.items():
    print(f"{name:40} -> {new_name}")
  print(
    f"{len(report.mapped)} tensors mapped, {len(report.left_over)} left over"
  )
  for name in report.left_over:
    print(f"left over: {name}")
  print(f"wrote {args.output}")


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
