"""Turn a config into an experiment, and train it.

The modules that build and train an experiment take objects and numbers, not
configs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import copy
import json
import os
import pathlib
import typing
from typing import Any

import ml_collections

from l2t_jax import data, errors, models
import l2t_jax.config
from l2t_jax.method import objectives, transfer
from l2t_jax.models import weight_files
from l2t_jax.results import transfer_map
from l2t_jax.run import experiments, sources, train
from l2t_jax.runtime import (
  checkpoint,
  compilation,
  phases,
  run_folder,
  tracking,
)


def train_and_evaluate(
  config: ml_collections.ConfigDict,
  workdirs: Mapping[int, str | os.PathLike[str]],
) -> list[dict[str, Any]]:
  """Train the experiment of a config, resuming interrupted runs.

  Args:
    config: the fields of l2t_jax/config.py; `seed` is not read.
    workdirs: seed -> folder of its run. Several seeds train side by side.

  Returns:
    The contents of the summary.json files, in the order of `workdirs`.

  Raises:
    errors.Stop: as `train.Training.run`, and for a config that cannot work.
  """
  check(config, workdirs)
  summaries = train.completed(workdirs, config.epochs)
  left = {s: path for s, path in workdirs.items() if s not in summaries}
  if left:
    trained = train.Training(resolve(config)).run(left)
    summaries |= zip(left, trained, strict=True)
  return [summaries[seed] for seed in workdirs]


def check(
  config: ml_collections.ConfigDict,
  workdirs: Mapping[int, str | os.PathLike[str]] | None = None,
  digest: Callable[[str], str] = data.digest,
) -> None:
  """Reject a config that cannot run, before anything is loaded or written.

  Args:
    config: the fields of l2t_jax/config.py, except `seed`.
    workdirs: seed -> folder of its run; None for a single run without a folder.
    digest: see `contents`. A cache saves time if many configs are checked that
      name the same files.

  Raises:
    errors.InputError: a value is wrong, source weights are missing, or a folder
      holds a run of another config.
  """
  for seed in workdirs or (config.seed,):
    one = copy.deepcopy(config)
    one.seed = seed
    l2t_jax.config.check(one)
  if workdirs:
    train.check_folders(
      describe(config),
      workdirs,
      l2t_jax.config.FREE_FIELDS,
      contents(config, digest),
    )
    # Nothing is left to train: no need for weights or trackers.
    if all(train.is_complete(w, config.epochs) for w in workdirs.values()):
      return
  begun = [train.has_begun(w) for w in (workdirs or {}).values()]
  if config.init_from and not (begun and all(begun)):
    train.steps_to_start_from(config.init_from)
  data_fields(config)
  load_map(config)
  tracking.check_trackers(config.trackers)
  if objectives.get_method(config.method).needs_source:
    for fields in l2t_jax.config.source_configs(config).values():
      weight_files.check_exists(pathlib.Path(fields.weights))


def describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return a config as config.json holds it."""
  return json.loads(config.to_json())


@phases.phase("data")
def resolve(config: ml_collections.ConfigDict) -> experiments.Experiment:
  """Load everything that a config names.

  Args:
    config: the fields of l2t_jax/config.py, accepted by `check`.

  Raises:
    errors.InputError: images, weights or a network cannot be loaded.
  """
  method = objectives.get_method(config.method)
  dtype, _ = compilation.PRECISIONS[config.precision]
  reading = data_fields(config)
  images = data.open_images(reading)
  given = {}
  if method.needs_source:
    given = {
      name: load_source(fields.weights, fields, config.precision)
      for name, fields in l2t_jax.config.source_configs(config).items()
    }
  num_classes = len(reading.classes or images.class_names)
  num_outputs = config.target.num_outputs
  target = models.create(config.target.model, num_outputs or num_classes, dtype)
  task = objectives.get_task(config.target.task)
  if task is not objectives.CLASSIFICATION and not num_outputs:
    _check_num_outputs(target, images, reading, num_classes)
  return experiments.Experiment(
    target,
    images,
    reading,
    settings(config),
    given,
    task,
    tuple(config.target.taps),
    load_map(config),
    describe(config),
    l2t_jax.config.FREE_FIELDS,
    contents(config),
    config.target.label_smoothing,
    config.target.batch_norm_groups,
  )


def load_source(
  weights: str | os.PathLike[str],
  fields: ml_collections.ConfigDict,
  precision: str,
) -> experiments.Source:
  """Read a source from a weight file, with the fields of `config.source`."""
  return sources.load_source(
    weights,
    fields.taps,
    image_size=fields.image_size,
    mean=fields.mean,
    std=fields.std,
    bands=fields.bands,
    class_names=fields.class_names,
    precision=precision,
  )


def contents(
  config: ml_collections.ConfigDict,
  digest: Callable[[str], str] = data.digest,
) -> dict[str, str]:
  """Return field -> digest of the files that it names; "" if there are none.

  The digest of a folder covers the relative names and sizes of its images, that
  of a file its bytes, and that of a run the file of its target and the
  iteration of its newest checkpoint.
  """
  paths = {
    name: l2t_jax.config.get(config, name) for name in l2t_jax.config.PATHS
  }
  if config.init_from:
    paths["init_from"] = os.path.join(config.init_from, run_folder.TARGET)
  if objectives.get_method(config.method).needs_source:
    for name, fields in l2t_jax.config.source_configs(config).items():
      field = f"sources.{name}.weights" if name else "source.weights"
      paths[field] = fields.weights
  digests = {name: digest(path) for name, path in paths.items() if path}
  if digests.get("init_from"):
    steps = checkpoint.steps_in(
      pathlib.Path(config.init_from, run_folder.CHECKPOINTS)
    )
    digests["init_from"] += f" {max(steps, default=0)}"  # It starts from there.
  if config.data.source == "tfds":  # A cache; data.name identifies the images.
    digests["data.path"] = "that of data.name"
  return digests


def data_fields(config: ml_collections.ConfigDict) -> data.DataFields:
  """Extract the fields about images from a config."""
  fields = config.data.to_dict()
  if not objectives.get_method(config.method).losses:
    # No loss of this method reads unlabelled images.
    fields |= {"unlabeled": False, "unlabeled_path": ""}
  return data.DataFields(**fields)


def settings(config: ml_collections.ConfigDict) -> experiments.Settings:
  """Extract the settings from a config."""
  fields = config.to_dict()
  fields["losses"] = {name: fields[name] for name in l2t_jax.config.LOSS_GROUPS}
  return experiments.Settings(
    **{
      name: kind(**fields[name]) if hasattr(kind, "_fields") else fields[name]
      for name, kind in typing.get_type_hints(experiments.Settings).items()
    }
  )


def load_map(config: ml_collections.ConfigDict) -> transfer.TransferMap | None:
  """Read the map that config.transfer.map names; None if it names none."""
  path = config.transfer.map
  if not path:
    return None
  weights = transfer_map.read_weights(path)
  scale = "std" if transfer_map.read_scales(path) else "none"
  if config.transfer.feature_scale != scale:
    raise errors.InputError(
      f"config.transfer.feature_scale is {config.transfer.feature_scale!r}, but"
      f" the weights of {path} were learned with {scale!r}; set it to that"
    )
  return transfer.TransferMap(*weights)


def _check_num_outputs(target, images, reading, num_classes):
  """Require config.target.num_outputs if images have several targets.

  By broadcasting, a single output would silently be compared with all of them.
  Only the user knows the right number: a target may be one class among many.
  """
  targets = images.train.targets
  if targets is None or targets.ndim != 2:
    return
  num_targets = targets.shape[1]
  outputs = models.trace(target, reading.image_shape).output_shape
  if outputs == (num_classes,) and num_targets not in (1, num_classes):
    raise errors.InputError(
      f"the data have {num_targets} targets for each image, but the target's"
      f" outputs are {['B', *outputs]}; set config.target.num_outputs:"
      f" {num_targets} is one for each target, {num_classes} leaves it as it is"
    )
