"""Convert a PyTorch checkpoint to a weight file that training reads.

    python -m l2t_jax.pretrained IN.pth OUT.safetensors --model=resnet32

The weight file is a safetensors file: plain arrays that are read without torch
and without running code. Its tensor "params/block1/conv1/kernel" is the Flax
variable with that path; its metadata hold the model's name, the number of
classes, and the name and SHA-256 of the checkpoint.

Submodules are named as in PyTorch, with "_" for the dot before a number:
"blocks2.0.bn1.running_mean" becomes "batch_stats/blocks2_0/bn1/mean".
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
  """Convert a checkpoint and list its tensors."""
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
