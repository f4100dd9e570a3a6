"""Convert a pre-trained network to a weight file that training reads.

    python -m l2t_jax.pretrained timm:convnext_tiny.fb_in1k OUT.safetensors
    python -m l2t_jax.pretrained keras:EfficientNetV2B0 OUT.safetensors
    python -m l2t_jax.pretrained torch:package.module:function OUT.safetensors \
      --checkpoint=mine.pth --image_size=64 --mean=0.5 --std=0.25
    python -m l2t_jax.pretrained mine.pth OUT.safetensors --model=resnet32

The first three convert a network of timm, Keras or any torch code, with the
weights of that library or of --checkpoint. The network becomes a program that
needs only JAX and includes its own normalisation; its blocks become taps. Its
outputs are compared with the library's before the file is written. The last one
maps a PyTorch checkpoint to a bundled network.

A weight file is a safetensors file: plain arrays, which are read without
running code.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import shlex
import sys

import jax
import numpy as np

from l2t_jax import errors, files, models
from l2t_jax.models import (
  convert_keras,
  convert_torch,
  programs,
  torch_weights,
  weight_files,
)
from l2t_jax.runtime import compilation, cpu_lowering

_LIBRARIES = {
  "timm": convert_torch.from_timm,
  "keras": convert_keras.from_keras,
  "torch": convert_torch.from_module,
}
# Largest difference between a program and its library, as a share of the
# largest logit.
_TOLERANCES = {"f32": 1e-4, "tf32": 1e-2, "bf16": 0.1}


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument(
    "network",
    help="timm:NAME, keras:NAME, torch:package.module:function, or a checkpoint"
    " (.pth, .pt, .tar or .safetensors) of --model",
  )
  parser.add_argument("output", type=pathlib.Path, help="OUT.safetensors")
  parser.add_argument(
    "--model", choices=list(models.MODELS), help="network of a checkpoint"
  )
  parser.add_argument(
    "--checkpoint", type=pathlib.Path, help="file of your own weights"
  )
  parser.add_argument(
    "--key",
    default="",
    help="which of several state dicts of a checkpoint, or the prefix of the"
    " names of its tensors",
  )
  parser.add_argument(
    "--image_size", type=_positive, default=0, help="side in pixels"
  )
  parser.add_argument(
    "--mean", type=_from_0_to_1, default=(), help="mean of R,G,B, from 0 to 1"
  )
  parser.add_argument(
    "--std",
    type=_positive_numbers,
    default=(),
    help="standard deviation of R,G,B on the same scale",
  )
  parser.add_argument(
    "--precision",
    choices=list(compilation.PRECISIONS),
    default="f32",
    help="config.precision of the runs that will read it (f32)",
  )
  return parser


def _positive(text):
  if not text.isdigit() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
  return int(text)


def _numbers(text):
  try:
    values = tuple(map(float, text.split(",")))
  except ValueError:
    values = ()
  if len(values) not in (1, 3):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be one number, or three with commas"
    )
  return values


def _from_0_to_1(text):
  values = _numbers(text)
  if not all(0 <= value <= 1 for value in values):
    raise argparse.ArgumentTypeError(
      f"{text!r} must be on a scale from 0 to 1: divide values for pixels from"
      " 0 to 255 by 255"
    )
  return values


def _positive_numbers(text):
  values = _from_0_to_1(text)
  if min(values) <= 0:
    raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
  return values


def main(args: argparse.Namespace) -> None:
  """Convert a network and print a summary."""
  library, _, name = args.network.partition(":")
  read = args.checkpoint or pathlib.Path(args.network)
  if read.exists() and args.output.exists() and read.samefile(args.output):
    raise errors.InputError(
      f"{args.output} is the checkpoint; give another name for the output"
    )
  if library in _LIBRARIES and name:
    if args.model:
      raise errors.InputError(f"{args.network} needs no --model")
    _convert_network(args, library, name)
  else:
    _convert_checkpoint(args)
  print(f"wrote {args.output}")


def _convert_network(args, library, name):
  # Convolutions of torch have their channels first: the rules transpose them.
  cpu_lowering.install()
  # Fail early, not after the conversion.
  with files.output_errors(args.output):
    files.check_place(args.output)
  reading = programs.Reading(args.image_size, args.mean, args.std)
  network = _LIBRARIES[library](name, args.checkpoint, args.key, reading)
  dtype, precision = compilation.PRECISIONS[args.precision]
  weight_files.check_finite(args.checkpoint or args.network, network.params)
  try:
    program = programs.export(network, dtype=dtype, precision=precision)
  except Exception as error:  # A library's operations may raise anything.
    raise errors.InputError(
      f"{args.network} cannot be exported: {errors.first_line(error)};"
      f" {programs.HOW_TO_BE_TRACED}"
    ) from error
  functions = programs.to_functions(
    program, network.params, network.taps, network.default_taps
  )
  num_classes = _check_result(network, functions, args.precision)
  size = network.image_size
  taps = models.select_taps(models.trace(functions, (size, size, 3)))
  metadata = {
    "model": args.network,
    "num_classes": str(num_classes),
    "precision": args.precision,
    "jax": jax.__version__,
    "command": shlex.join(
      ["python", "-m", "l2t_jax.pretrained", *sys.argv[1:]]
    ),
  }
  if args.checkpoint:
    metadata |= {
      "converted_from": args.checkpoint.name,
      "sha256": hashlib.sha256(args.checkpoint.read_bytes()).hexdigest(),
    }
  with files.output_errors(args.output):
    weight_files.save_program(args.output, network, program, metadata)
  for note in network.notes:
    print(note)
  has_classifier = network.metadata.get("num_classes") != "0"
  print(
    f"{args.network}: {size}x{size} RGB images,"
    f" {num_classes if has_classifier else 'no'} classes,"
    f" {len(network.taps)} taps"
  )
  for name, shape in taps.items():
    print(f"default tap {name}: {'x'.join(map(str, shape))}")


def _check_result(network, functions, precision):
  """Compare a program with its library; return the number of classes."""
  size = network.image_size
  images = np.random.default_rng(0).random((2, size, size, 3), np.float32)
  expected = network.reference(images)
  logits, _, _ = jax.jit(
    lambda params, images: functions.apply(params, {}, images, train=False)
  )(network.params, images)
  if logits.shape != expected.shape or logits.ndim != 2:
    raise errors.InputError(
      f"the network returns {list(expected.shape)} for images"
      f" {list(images.shape)}; it must return logits, [B, K]"
    )
  scale = float(np.abs(expected).max())
  difference = float(np.abs(logits - expected).max()) / (scale or 1.0)
  print(
    f"largest relative difference to the library's logits: {difference:.1e}"
  )
  if not difference <= _TOLERANCES[precision]:
    raise errors.InputError(
      f"the program's logits differ by {difference:.1e} from the library's,"
      f" more than {_TOLERANCES[precision]}; nothing is written"
    )
  return logits.shape[1]


def _convert_checkpoint(args):
  """Map the tensors of a bundled network's checkpoint, and list them."""
  if not args.model:
    raise errors.InputError(
      f"{args.network} is not timm:NAME, keras:NAME or torch:package.module:"
      "function; for the checkpoint of a bundled network give --model"
    )
  if args.checkpoint or args.precision != "f32":
    raise errors.InputError(
      "--checkpoint and --precision are for timm:, keras: and torch:"
    )
  report = torch_weights.convert_file(
    pathlib.Path(args.network),
    args.output,
    args.model,
    key=args.key,
    reading=programs.Reading(args.image_size, args.mean, args.std),
  )
  for note in report.notes:
    print(note)
  for name, new_name in report.mapped.items():
    print(f"{name:40} -> {new_name}")
  print(
    f"{len(report.mapped)} tensors mapped, {len(report.left_over)} left over"
  )
  for name in report.left_over:
    print(f"left over: {name}")


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
