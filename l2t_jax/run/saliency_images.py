"""Saliency pictures of a source, for uniform and for learned weights."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import colormaps
import numpy as np
from PIL import Image

from l2t_jax import cli, errors
from l2t_jax.method import saliency, training, transfer
from l2t_jax.results import run_reader, transfer_map
from l2t_jax.run import feature_scales, from_config
from l2t_jax.run import setup as setups
from l2t_jax.runtime import checkpoint, compilation, run_folder

_PICTURE_SIZE = 208  # Largest side in pixels; twice the size on the page.
_NUM_PAIRS_SHOWN = 3  # Number of pairs with pictures, the strongest first.


class Pictures(NamedTuple):
  """Saliency of some images for one pair."""

  pair: str
  uniform: tuple[str, ...]  # One data URL per image.
  learned: tuple[str, ...]


class Saliency(NamedTuple):
  """Saliency of the source, with uniform and with learned weights."""

  images: tuple[str, ...]  # Data URLs.
  pairs: tuple[Pictures, ...]


def compute_saliency(run: run_reader.Run, num_images: int) -> Saliency:
  """Rebuild a run and compute its source's saliency on validation images.

  Args:
    run: a run that learned channel weights.
    num_images: number of images, evenly spaced in the validation split.

  Returns:
    Pictures of the run's strongest pairs.

  Raises:
    errors.InputError: data, weights or checkpoints no longer exist, or the run
      was made from arrays in a notebook.
    errors.StorageError: a checkpoint cannot be read.
  """
  assert run.map is not None  # The run has learned channel weights.
  if run.config["data"]["source"] == "arrays":
    raise errors.InputError("the run was made from arrays, which are not kept")
  config = cli.load_config(str(run.workdir / run_folder.CONFIG))
  _, precision = compilation.PRECISIONS[config.precision]
  with jax.default_matmul_precision(precision):
    return _compute(run, config, num_images)


def _compute(run, config, num_images):
  setup = setups.build(from_config.resolve(config))
  problem = setup.problem
  meta_params = _restore(run, setup.create_state(config.seed)).meta_params
  images = _spread_images(setup.dataset, num_images)
  sources = feature_scales.set_scales(
    setup.sources, transfer_map.scales_of(run.map)
  )

  @jax.jit
  def features_fn(images):
    _, features = training.run_sources(problem.source_fns, sources, images)
    return features

  source = transfer.prepare_source(
    features_fn(images), problem.pairs, problem.target_taps
  )
  assert problem.weights_fn is not None  # The run has a transfer map.
  weights = problem.weights_fn(meta_params, source.pooled)

  def look(tap, channel_weights):
    seen = saliency.saliency(
      lambda images: features_fn(images)[tap], images, channel_weights
    )
    return tuple(_heat(one) for one in np.asarray(seen))

  pairs = []
  for strong in transfer_map.strongest_first(run.map)[:_NUM_PAIRS_SHOWN]:
    learned = weights.channel[f"{strong['source']}->{strong['target']}"]
    uniform = np.full_like(learned, 1 / learned.shape[-1])
    pairs.append(
      Pictures(
        transfer_map.pair_name(strong),
        look(strong["source"], uniform),
        look(strong["source"], learned),
      )
    )
  mean, std = setup.image_format.mean, setup.image_format.std
  pixels = np.asarray(images) * np.array(std) + np.array(mean)
  lowest, highest = setup.dataset.values
  pixels = (pixels - lowest) / (highest - lowest or 1)
  # Images with other numbers of channels are shown in grey.
  if pixels.shape[-1] not in (1, 3):
    pixels = pixels.mean(axis=-1, keepdims=True)
  return Saliency(tuple(_picture(image) for image in pixels), tuple(pairs))


def _restore(run, state):
  folder = run.workdir / run_folder.CHECKPOINTS
  if not folder.is_dir():
    raise errors.InputError(f"{folder} does not exist any more")
  with checkpoint.Checkpoints(folder) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise errors.InputError(f"{folder} has no checkpoint any more")
    try:
      return checkpoints.restore(steps[-1], state)[0]
    except checkpoint.DamagedError as error:
      raise errors.InputError(f"{folder} cannot be read: {error}") from error


def _spread_images(dataset, count):
  """Return evenly spaced validation images, which may be sorted by class."""
  wanted = np.unique(np.linspace(0, dataset.num_val - 1, count).round())
  found, start = [], 0
  for batch in dataset.eval_batches("val"):
    inside = wanted[(wanted >= start) & (wanted < start + len(batch.images))]
    found.append(batch.images[(inside - start).astype(int)])
    start += len(batch.images)
  return jnp.concatenate(found)


def _heat(values):
  """Render a map of values as a picture, the largest values brightest."""
  # With the maximum as scale, a single outlier would leave the rest black.
  scale = np.quantile(values, 0.99) or values.max() or 1.0
  return _picture(colormaps["inferno"](np.clip(values / scale, 0, 1))[..., :3])


def _picture(values):
  """Encode an image [H, W, 1 or 3], from 0 to 1, as a data URL."""
  pixels = np.clip(np.round(values * 255), 0, 255).astype(np.uint8)
  image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
  image.thumbnail((_PICTURE_SIZE, _PICTURE_SIZE))
  file = io.BytesIO()
  image.save(file, "png")
  return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
