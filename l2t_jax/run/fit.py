"""Transfer in a notebook: from arrays and networks to a trained target.

    from l2t_jax import learn

    config = fit.default_config()
    config.epochs = 30
    result = fit.fit(
      MyTarget(num_classes=10),
      {"x_train": images, "y_train": labels},
      source=fit.Source(my_source, my_params, {"batch_stats": my_stats}),
      config=config,
    )
    result.summary["test_accuracy"]
    result.figure()
    logits = result.predict(new_images)

It is what `train.py` does, with objects in the place of files.
"""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
from matplotlib import figure
import ml_collections
import numpy as np

from l2t_jax import errors, models, predict, types
import l2t_jax.config
from l2t_jax.data import from_arrays
from l2t_jax.results import map_picture, transfer_map
from l2t_jax.run import setup, train
from l2t_jax.runtime import cpu_lowering


def default_config() -> ml_collections.ConfigDict:
  """Return the fields of l2t_jax/config.py, to be changed for `fit`.

  data.mean and data.std are (): those of the training images.
  """
  config = l2t_jax.config.get_config()
  config.data.mean = config.data.std = ()
  return config


_FEW_IMAGES = 256  # Looked at together.


class Source(NamedTuple):
  """A trained network whose features are transferred."""

  network: models.Network
  # None where an NNX module holds them.
  params: types.PyTree | None = None
  # Its other collections, such as {"batch_stats": ...}.
  model_state: types.PyTree | None = None
  # A name or glob of its layers, or several; () for the last one of each
  # resolution.
  taps: str | tuple[str, ...] = ()
  # What it was trained on; 0 and () for what the target sees.
  image_size: int = 0
  channels: int = 0
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()


class Result(NamedTuple):
  """A trained target, at its best validation epoch."""

  predictor: predict.Predictor  # Holds network, params and model_state.
  summary: dict[str, Any]  # Content of summary.json.
  transfer_map: dict[str, Any] | None  # Of transfer_map.json.
  workdir: pathlib.Path  # Everything else that `train.py` leaves.

  def predict(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Compute the target's outputs in eval mode.

    Args:
      images: uint8 [N, H, W] or [N, H, W, C], as in training.
      batch_size: images at a time.

    Returns:
      Logits, or what else the network returns, [N, ...].
    """
    _, size, channels = self.predictor.image_format.shape
    images = _with_channels(images)
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, channels):
      raise errors.InputError(
        f"images are {images.dtype} {list(images.shape)}, but must be uint8"
        f" [N, {size}, {size}, {channels}], as in training"
      )
    return self.predictor.outputs(images, min(batch_size, len(images) or 1))

  def figure(self) -> figure.Figure:
    """Draw what was transferred where."""
    if self.transfer_map is None:
      raise errors.InputError(
        f"method {self.summary['method']!r} matches no features: it has no"
        " transfer map"
      )
    return map_picture.draw(self.transfer_map)


def fit(
  target: models.Network,
  arrays: Mapping[str, np.ndarray],
  *,
  source: Source | Mapping[str, Source] | None = None,
  config: ml_collections.ConfigDict | None = None,
  task: types.Task | None = None,
  workdir: str | os.PathLike[str] | None = None,
) -> Result:
  """Train a target with what its sources know.

  Args:
    target: a Linen module; or an NNX module, or a function that makes one; or
      `models.Functions`. An NNX module that exists starts from its values.
    arrays: "x_train", uint8 images [N, H, W] or [N, H, W, C], and "y_train",
      their classes [N], or "t_train", [N, ...], what else `task` reads; the
      same with "_val" and "_test". What is missing of these is split off.
    source: what is transferred from; several with a name each; None for
      methods that need none.
    config: the fields of l2t_jax/config.py, from `default_config`. What the
      objects say (data.source, image_size, channels, source, target.model and
      task) is filled in.
    task: what is learned; None for classification.
    workdir: folder of the run, where it resumes if it was cut off; None for a
      new one among the system's temporary files, where it stays.

  Returns:
    The target and what is known of the run.

  Raises:
    errors.InputError: for arrays, networks and values that cannot work
      together.
  """
  cpu_lowering.install()
  config = ml_collections.ConfigDict(
    (config or default_config()).to_dict(), type_safe=False
  )
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  sources = {"": source} if isinstance(source, Source) else dict(source or {})
  opened = from_arrays.image_set(arrays, "arrays")
  _describe_data(config, arrays)
  _describe_networks(config, target, sources, task)
  given = setup.Given(
    opened,
    {name: _with_variables(one) for name, one in sources.items()},
    target,
    task,
  )
  workdir = pathlib.Path(workdir or tempfile.mkdtemp(prefix="l2t_jax_"))
  summary = train.train_and_evaluate(config, workdir, given)
  map_file = workdir / transfer_map.FILE
  return Result(
    predict.load(workdir, network=target),
    summary,
    json.loads(map_file.read_text()) if map_file.exists() else None,
    workdir,
  )


def _describe_data(config, arrays):
  """Say in the config what the arrays are, so that another run is refused."""
  images = _with_channels(arrays["x_train"])
  height, width, channels = images.shape[1:]
  if height != width:
    raise errors.InputError(
      f"images are {height}x{width}; they must be square: crop or resize them"
    )
  if not (config.data.mean and config.data.std):
    mean, std = _statistics(images)
    config.data.mean = config.data.mean or mean
    config.data.std = config.data.std or std
  config.data.source, config.data.name = "arrays", _digest(arrays)
  config.data.image_size, config.data.channels = height, channels
  config.data.eval_resize = height  # Large ones are evaluated as they are.


def _statistics(images):
  """Return mean and standard deviation of each channel, on a scale of 0 to 1.

  They come of how often each value is there: floats would take much memory.
  """
  counts = np.zeros((images.shape[-1], 256), np.int64)
  for start in range(0, len(images), _FEW_IMAGES):
    for channel, count in enumerate(counts):
      pixels = images[start : start + _FEW_IMAGES, ..., channel]
      count += np.bincount(pixels.ravel(), minlength=256)
  values, total = np.arange(256) / 255, counts[0].sum()
  mean = counts @ values / total
  std = np.sqrt(np.sum(counts * (values - mean[:, None]) ** 2, axis=1) / total)
  return tuple(
    tuple(np.round(numbers, 4).tolist()) for numbers in (mean, std + 1e-6)
  )


def _describe_networks(config, target, sources, task):
  config.target.model = _describe(target)
  config.target.task = "classification"
  if task:
    config.target.task = " ".join(map(_name_of_function, task))
  config.sources = {}
  for name, one in sources.items():
    fields = l2t_jax.config.source()
    values = _digest((_with_variables(one)[1:3], one.channels))
    fields.weights = f"{_describe(one.network)} {values}"
    fields.taps = (one.taps,) if isinstance(one.taps, str) else one.taps
    for field in ("image_size", "mean", "std"):
      fields[field] = getattr(one, field)
    if name:
      config.sources[name] = fields
    else:
      config.source = fields


def _with_variables(source):
  params, model_state = source.params, dict(source.model_state or {})
  if params is None:
    if not isinstance(source.network, nnx.Module):
      raise errors.InputError(
        f"source {_name(source.network)} has no params; give those that it was"
        " trained to"
      )
    # The module's own: key and shape do not matter.
    params, model_state = models.init(
      source.network, jax.random.key(0), (1, 1, 1)
    )
  metadata = {"channels": str(source.channels)} if source.channels else {}
  return setup.SourceNetwork(source.network, params, model_state, metadata)


def _with_channels(images):
  return images[..., None] if images.ndim == 3 else images


def _name(network):
  return getattr(network, "__name__", type(network).__name__)


def _name_of_function(function):
  if hasattr(function, "__qualname__"):
    return f"{function.__module__}.{function.__qualname__}"
  return _without_addresses(repr(function))  # A partial, say.


def _describe(network):
  """Name a network so that another one has another name, in any process."""
  what: Any = repr(network)
  if isinstance(network, nnx.Module):
    what = models.init(network, jax.random.key(0), (1, 1, 1))
  elif not isinstance(network, nn.Module):
    what = ""  # Functions: their names have to do.
  else:
    what = _without_addresses(what)
  return f"{_name(network)} {_digest(what)}"


def _without_addresses(text):
  return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest(tree):
  """16 hex digits that tell arrays apart."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf)
    what = (jax.tree_util.keystr(path), array.shape, str(array.dtype))
    digest.update(repr(what).encode() + array.tobytes())
  return digest.hexdigest()[:16]
