"""Sources from weight files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import os
import pathlib

from l2t_jax import errors
from l2t_jax.models import weight_files
from l2t_jax.run import experiments
from l2t_jax.runtime import compilation


def load_source(
  path: str | os.PathLike[str],
  taps: str | tuple[str, ...] = (),
  *,
  image_size: int = 0,
  mean: Sequence[float] = (),
  std: Sequence[float] = (),
  precision: str = "f32",
) -> experiments.Source:
  """Read a source from a weight file.

  Args:
    path: the target.safetensors of a run, or what `python -m
      l2t_jax.pretrained` wrote.
    taps: names or globs of layers; () for the default ones.
    image_size: height and width of its images in pixels; 0 for what the file
      says.
    mean: of the red, green and blue of its images, on a scale from 0 to 1; ()
      for what the file says.
    std: the same for the standard deviation.
    precision: config.precision of the run.

  Raises:
    errors.InputError: the file is missing or damaged, or holds a converted
      network that takes other images or has another precision.
  """
  loaded = weight_files.load_network(
    pathlib.Path(path), compilation.PRECISIONS[precision][0]
  )
  if "taps" in loaded.metadata:
    _check_program(path, loaded.metadata, image_size, (*mean, *std), precision)
  recorded = lambda what: tuple(json.loads(loaded.metadata.get(what, "[]")))
  return experiments.Source(
    loaded.network,
    loaded.params,
    loaded.model_state,
    experiments.as_patterns(taps),
    image_size or int(loaded.metadata.get("image_size", 0)),
    int(loaded.metadata.get("channels", 0)),
    tuple(mean) or recorded("mean"),
    tuple(std) or recorded("std"),
    recorded("class_names"),
    loaded.metadata["num_classes"] != "0",
    str(path),
  )


def _check_program(
  path: str | os.PathLike[str],
  metadata: Mapping[str, str],
  image_size: int,
  normalisation: Sequence[float],
  precision: str,
) -> None:
  """Require the images and the precision that a converted network has."""
  size = int(metadata["image_size"])
  again = f"convert it again, with {{}}: {metadata['command']}"
  if image_size not in (0, size):
    raise errors.InputError(
      f"the image_size of the source {path} is {image_size}, but it was"
      f" converted for {size}; leave it out, or"
      f" {again.format(f'--image_size={image_size}')}"
    )
  if normalisation:
    raise errors.InputError(
      f"the source {path} normalises its images itself; leave out its fields"
      " mean and std"
    )
  if precision != metadata["precision"]:
    raise errors.InputError(
      f"config.precision is {precision!r}, but the source {path} was converted"
      f" for {metadata['precision']!r};"
      f" {again.format(f'--precision={precision}')}"
    )
