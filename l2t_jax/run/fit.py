"""Transfer in a notebook: from arrays and networks to a trained target.

    import l2t_jax as l2t

    config = l2t.default_config()
    config.epochs = 30
    result = l2t.fit(
      MyTarget(num_classes=10),
      {"x_train": images, "y_train": labels},
      source=l2t.Source(my_source, my_params, {"batch_stats": my_stats}),
      config=config,
    )
    result.summary["test_accuracy"]
    result.figure()
    logits = result.predict(new_images)

It does what `train.py` does, with objects in place of files.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

from matplotlib import figure
import ml_collections
import numpy as np

from l2t_jax import errors, models, types
import l2t_jax.config
from l2t_jax.data import from_arrays
from l2t_jax.method import objectives
from l2t_jax.results import map_picture, transfer_map
from l2t_jax.run import experiments, from_config, train
from l2t_jax.run import predictor as predictors
from l2t_jax.runtime import compilation, cpu_lowering

SourceLike = experiments.Source | str | os.PathLike[str]


def default_config() -> ml_collections.ConfigDict:
  """Return the fields of l2t_jax/config.py, with defaults suited to `fit`.

  data.mean and data.std are (): they are computed from the training images.
  transfer.feature_scale is "std": source features are divided by their standard
  deviation, so that one β suits networks of different kinds.
  """
  config = l2t_jax.config.get_config()
  config.data.mean = config.data.std = ()
  config.transfer.feature_scale = "std"
  return config


class Result(NamedTuple):
  """A trained target, at its best validation epoch."""

  predictor: predictors.Predictor  # Holds network, params and model_state.
  summary: dict[str, Any]  # Content of summary.json.
  transfer_map: dict[str, Any] | None  # Content of transfer_map.json.
  workdir: pathlib.Path  # Holds all other files that `train.py` writes.

  def __repr__(self) -> str:
    return f"Result: {self.predictor!r}, run in {self.workdir}"

  def predict(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Compute the target's outputs in eval mode.

    Args:
      images: [N, H, W] or [N, H, W, C], of the same type as in training.
      batch_size: images per forward pass.

    Returns:
      The outputs of the network, such as logits, [N, ...].
    """
    if self.predictor.image_format.channels == 1:
      images = _with_channels(images)
    return self.predictor.outputs(images, min(batch_size, len(images) or 1))

  def as_source(self, taps: str | tuple[str, ...] = ()) -> experiments.Source:
    """Return the trained target as a source for other targets.

    Args:
      taps: names or globs of its layers; () for the default ones.
    """
    trained = self.predictor
    return experiments.Source(
      trained.network,
      trained.params,
      trained.model_state,
      taps,
      trained.image_format.size,
      trained.image_format.channels,
      trained.image_format.mean,
      trained.image_format.std,
      class_names=trained.class_names,
      bit_depth=trained.bit_depth if trained.dtype == np.uint16 else 0,
    )

  def figure(self) -> figure.Figure:
    """Draw the transfer map."""
    if self.transfer_map is None:
      raise errors.InputError(
        f"method {self.summary['method']!r} has no transfer map: only afd and"
        " the fm_* and l2t_* methods have one"
      )
    return map_picture.draw(self.transfer_map)


def fit(
  target: models.Network,
  arrays: Mapping[str, np.ndarray],
  *,
  source: SourceLike | Mapping[str, SourceLike] | None = None,
  config: ml_collections.ConfigDict | None = None,
  task: types.Task | None = None,
  workdir: str | os.PathLike[str] | None = None,
) -> Result:
  """Train a target network, with transfer from its sources.

  Args:
    target: a Linen module; or an NNX module, or a function that makes one; or
      `models.Functions`. An NNX module is trained from its current values.
    arrays: "x_train", images [N, H, W] or [N, H, W, C] of uint8, uint16 or
      float32, and "y_train", their classes [N], or "t_train", [N, ...], the
      targets that `task` reads; the same with "_val" and "_test". A missing
      validation or test set is split off the training images.
    source: a `Source`, or the path of a weight file, whose options are in
      config.source; or, for several sources, a dict of name -> either; None for
      methods without a source.
    config: the fields of l2t_jax/config.py, from `default_config`. The fields
      that the objects determine (data.source, image_size, channels, source,
      target.model and task) are filled in.
    task: what is learned; None for classification.
    workdir: folder of the run; an interrupted run resumes there. None for a new
      folder in the system's temporary directory, which is not deleted; without
      `config.checkpoint_steps`, the run is saved only at its end, or when a
      signal stops it.

  Returns:
    The trained target and the records of the run.

  Raises:
    errors.InputError: for arrays, networks and values that cannot work
      together.
  """
  experiment = make_experiment(
    target, arrays, source=source, config=config, task=task
  )
  if not workdir:
    workdir = tempfile.mkdtemp(prefix="l2t_jax_")
    print(f"the run is in {workdir}")
    settings = experiment.settings
    settings = settings._replace(checkpoint_every=settings.epochs)
    experiment = experiment._replace(settings=settings)
  workdir = pathlib.Path(workdir).expanduser()
  summary = train.train(experiment, workdir)
  map_file = workdir / transfer_map.FILE
  return Result(
    predictors.load(
      workdir, target, next(iter(experiment.sources.values()), None)
    ),
    summary,
    json.loads(map_file.read_text()) if map_file.exists() else None,
    workdir,
  )


def make_experiment(
  target: models.Network,
  arrays: Mapping[str, np.ndarray],
  *,
  source: SourceLike | Mapping[str, SourceLike] | None,
  config: ml_collections.ConfigDict | None,
  task: types.Task | None,
) -> experiments.Experiment:
  """Make the experiment that `fit` trains, from the arguments of `fit`."""
  compilation.use_cache()
  cpu_lowering.install()
  config = ml_collections.ConfigDict(
    (config or default_config()).to_dict(), type_safe=False
  )
  l2t_jax.config.check_fields(
    f"config.{name}" for name in l2t_jax.config.flatten(config.to_dict())
  )
  l2t_jax.config.expand_home(config)
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  images = from_arrays.image_set(arrays, "arrays")
  _fit_to_images(config, arrays)
  l2t_jax.config.check(config, names_objects=False)
  return experiments.Experiment(
    target,
    images,
    from_config.data_fields(config),
    from_config.settings(config),
    _as_sources(source, config),
    task or objectives.CLASSIFICATION,
    tuple(config.target.taps),
    from_config.load_map(config),
    contents=from_config.contents(config),
    free_fields=l2t_jax.config.FREE_FIELDS,
    label_smoothing=config.target.label_smoothing,
    batch_norm_groups=config.target.batch_norm_groups,
  )


def _as_sources(source, config):
  """Return name -> source, from the argument `source` of `fit`."""
  nothing = l2t_jax.config.source()
  given = source if isinstance(source, Mapping) else {"": source}
  if source is not None:
    _check_read(config, given, nothing)
  found = {}
  for name, one in given.items():
    if not isinstance(name, str) or "/" in name:
      raise errors.InputError(
        f"the name of a source is {name!r}; it must be a string without '/'"
      )
    fields = config.sources.get(name, nothing) if name else config.source
    if isinstance(one, str | os.PathLike):
      one = from_config.load_source(one, fields, config.precision)
    elif isinstance(one, experiments.Source):
      _check_unset(fields, nothing)
      one = experiments.with_plain_fields(one)
    if not isinstance(one, experiments.Source | None):
      raise errors.InputError(
        f"source is of type {type(one).__name__}; it must be a Source, the path"
        " of a weight file (python -m l2t_jax.pretrained writes one for torch,"
        " timm and Keras), or a dict of these"
      )
    found[name] = one
  return {name: one for name, one in found.items() if one is not None}


def _check_read(config, given, nothing):
  """Reject options of sources that are not given."""
  unread = [f"config.sources.{n}" for n in config.sources if n not in given]
  if "" not in given:
    unread += [
      f"config.source.{field}"
      for field, value in config.source.items()
      if field != "weights" and value != nothing[field]
    ]
  if unread:
    named = ", ".join(map(repr, given))
    why = "the source has no name" if "" in given else f"sources are {named}"
    raise errors.InputError(
      f"nothing reads {', '.join(unread)}, because {why}; options of a single"
      " source are in config.source, those of named ones in config.sources.NAME"
    )


def _check_unset(fields, nothing):
  """Reject fields that are only read for a source from a file."""
  for field, value in fields.items():
    if field != "weights" and value != nothing[field]:
      raise errors.InputError(
        f"{field} of the config's source is {value!r}, but this source is an"
        f" object; set {field} in it"
      )


def _fit_to_images(config, arrays):
  """Set the fields that describe the images."""
  images = _with_channels(arrays["x_train"])
  height, width, channels = images.shape[1:]
  if height != width:
    raise errors.InputError(
      f"images are {height}x{width}; they must be square: crop or resize them"
    )
  config.data.image_size, config.data.channels = height, channels
  # Evaluate images without resizing them, however large they are.
  config.data.eval_resize = height


def _with_channels(images):
  return images[..., None] if images.ndim == 3 else images
