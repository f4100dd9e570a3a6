"""Export the trained target of a run.

    python -m l2t_jax.export RUN OUT.pt
    python -m l2t_jax.export RUN OUT.safetensors
    python -m l2t_jax.export RUN OUT.stablehlo

RUN is the folder of a run, or its target.safetensors. The first two formats
are a PyTorch state dict with names and layouts as in torchvision's ResNet and
the authors' networks, written by torch.save (needs torch) or as safetensors.
The third is a program for CPU, GPU and TPU that maps images [B, H, W, C] with
any B, uint8 or the type of the training arrays, to the network's outputs. It
includes the weights and the normalisation:

    program = jax.export.deserialize(open("OUT.stablehlo", "rb").read())
    outputs = program.call(images)
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib

from flax import traverse_util
import jax.export
import numpy as np
import safetensors.numpy

from l2t_jax import errors, files, imports
from l2t_jax.models import torch_weights
from l2t_jax.run import predictor as predictors
from l2t_jax.runtime import cpu_lowering, run_folder

_PLATFORMS = ("cpu", "cuda", "tpu")


def to_state_dict(predictor: predictors.Predictor) -> dict[str, np.ndarray]:
  """Convert the target's variables to PyTorch's names and layouts.

  Raises:
    errors.InputError: PyTorch has no name for a variable.
  """
  variables = {"params": predictor.params, **predictor.model_state}
  tensors = {}
  for path, leaf in traverse_util.flatten_dict(variables).items():
    if path[0] == "rng":  # The PRNG key of dropout.
      continue
    if not torch_weights.has_torch_name(path) or leaf.ndim == 3:
      raise errors.InputError(
        f"{'/'.join(path)} has no name in PyTorch: only the kernels, biases and"
        " batch norms of convolutional networks have; export to .stablehlo"
      )
    array = torch_weights.to_torch_layout(np.asarray(leaf))
    tensors[torch_weights.torch_name(path)] = np.ascontiguousarray(array)
  return tensors


def to_stablehlo(predictor: predictors.Predictor) -> bytes:
  """Serialise the target as a program for `jax.export.deserialize`."""
  (batch,) = jax.export.symbolic_shape("batch")
  shape = (batch, *predictor.image_format.shape)
  exported = jax.export.export(jax.jit(predictor.apply), platforms=_PLATFORMS)(
    jax.ShapeDtypeStruct(shape, predictor.dtype)
  )
  return bytes(exported.serialize())


def write(
  predictor: predictors.Predictor, path: str | os.PathLike[str]
) -> None:
  """Write the target in the format that the path's suffix names.

  Raises:
    errors.InputError: the suffix is unknown, torch is missing, or the file
      cannot be written.
  """
  path = pathlib.Path(path).expanduser()
  check_output(path)
  if path.suffix == ".stablehlo":
    content = to_stablehlo(predictor)
  elif path.suffix == ".safetensors":
    content = safetensors.numpy.save(to_state_dict(predictor))
  else:
    content = _to_torch_file(to_state_dict(predictor))
  with files.output_errors(path):
    files.write(path, content)


def check_output(path: pathlib.Path) -> None:
  """Check the suffix and the place of a file, before its content is made.

  Raises:
    errors.InputError: the suffix is unknown, or the file cannot be written.
  """
  if path.suffix not in (".pt", ".pth", ".safetensors", ".stablehlo"):
    raise errors.InputError(
      f"{path} must end in .pt, .pth, .safetensors or .stablehlo"
    )
  with files.output_errors(path):
    files.check_place(path)


def _to_torch_file(tensors):
  torch = imports.require(
    "torch", needed_for="writing .pt", otherwise="write .safetensors"
  )
  file = io.BytesIO()
  torch.save({name: torch.tensor(x) for name, x in tensors.items()}, file)
  return file.getvalue()


def make_parser() -> errors.Parser:
  """Return the parser of the command line."""
  parser = errors.Parser(__doc__)
  parser.add_argument("run", type=pathlib.Path)
  parser.add_argument("output", type=pathlib.Path)
  return parser


def main(args: argparse.Namespace) -> None:
  """Export the target of a run."""
  cpu_lowering.install()
  check_output(args.output)
  if args.output.resolve() in (
    args.run.resolve(),
    (args.run / run_folder.TARGET).resolve(),
  ):
    raise errors.InputError(
      f"{args.output} is the run's own target; choose another file"
    )
  write(predictors.load(args.run), args.output)
  print(f"wrote {args.output}")


if __name__ == "__main__":
  errors.run_command(make_parser(), main)
