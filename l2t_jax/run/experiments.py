"""An experiment: what is trained, as objects and numbers.

`from_config.resolve` makes one from a config, `fit.fit` from objects, and
`train.train` trains it. It holds networks, images and losses as objects, not as
names that have to be looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
from typing import Any, NamedTuple

import chex
from flax import nnx, traverse_util
import jax
import numpy as np

from l2t_jax import data, errors, fingerprints, models, types
from l2t_jax.method import objectives, transfer


class Source(NamedTuple):
  """A trained network whose features are transferred."""

  network: models.Network
  # None if the network is an NNX module, which holds its own parameters.
  params: types.PyTree | None = None
  # The other variable collections, such as {"batch_stats": ...}.
  model_state: types.PyTree | None = None
  # Names or globs of layers; () for the last block of each resolution.
  taps: str | tuple[str, ...] = ()
  # Format of the images that it was trained on; 0 and () for the target's.
  image_size: int = 0  # Height and width in pixels.
  channels: int = 0
  mean: tuple[float, ...] = ()  # On a scale from 0 to 1.
  std: tuple[float, ...] = ()
  # Indices of the target's image channels that it gets as input, in the order
  # that it expects; () for all.
  bands: tuple[int, ...] = ()
  class_names: tuple[str, ...] = ()  # () if unknown.
  has_classifier: bool = True  # False if its outputs are not logits.
  origin: str = ""  # The file that it was read from, for messages.
  # Bits of the white of 16-bit images that mean and std refer to; 0 if unknown.
  bit_depth: int = 0


def with_plain_fields(source: Source) -> Source:
  """Return a source with numbers and tuples in place of arrays and lists.

  Raises:
    errors.InputError: a field cannot be converted.
  """
  floats = lambda values: tuple(map(float, np.ravel(values)))
  kinds: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("image_size", "channels", "bit_depth"), int),
    **dict.fromkeys(("mean", "std"), floats),
    "bands": lambda values: tuple(map(int, values)),
    "class_names": lambda values: tuple(map(str, values)),
  }
  plain = {}
  for name, kind in kinds.items():
    value = getattr(source, name)
    try:
      plain[name] = kind(value)
    except (TypeError, ValueError) as error:
      raise errors.InputError(
        f"{name} of the source is {value!r}, which is of the wrong type"
      ) from error
  return source._replace(**plain)


class Transfer(NamedTuple):
  """Matching of features; the fields of config.transfer."""

  pairs: str | tuple[str, ...]
  beta: chex.Numeric
  channel_weights: str
  pair_weights: str
  pair_activation: str
  feature_scale: str
  map: str


class Optimizer(NamedTuple):
  """The optimizer of real update and look-ahead; config.optimizer."""

  name: str
  learning_rate: chex.Numeric
  schedule: str
  warmup_steps: int
  warmup_epochs: float
  momentum: float
  b2: float
  weight_decay: float
  decayed: str
  clip_norm: float
  ema_decay: float


class Meta(NamedTuple):
  """Adam for the meta update; config.meta."""

  learning_rate: chex.Numeric
  weight_decay: float
  clip_norm: float
  update_every: int


class Bilevel(NamedTuple):
  """The look-ahead and its derivative; config.bilevel."""

  num_inner_steps: int
  look_ahead_loss: str
  outer_images: str
  mode: str
  loop: str


class Scalars(NamedTuple):
  """Numbers that compiled programs take as arguments.

  A program serves all of their values: tuning them compiles nothing.
  """

  learning_rate: chex.Numeric
  meta_learning_rate: chex.Numeric
  beta: chex.Numeric
  losses: Mapping[str, Mapping[str, chex.Numeric]]


class Settings(NamedTuple):
  """The numbers of an experiment: fields of a config, by the same names.

  l2t_jax/config.py documents them and has their rules and defaults. The paper's
  values are in the configs, not here.
  """

  method: str
  seed: int
  epochs: int
  init_from: str
  batch_size: int
  precision: str
  shard_params: bool
  bad_numbers: str
  transfer: Transfer
  # Hyper-parameters of other losses: group of the config -> name -> value.
  losses: Mapping[str, Mapping[str, chex.Numeric]]
  optimizer: Optimizer
  meta: Meta
  bilevel: Bilevel
  trackers: tuple[str, ...]
  log_every: int
  checkpoint_every: int
  checkpoint_steps: int
  evaluate_test: bool

  @property
  def scalars(self) -> Scalars:
    """The scalars among the settings."""
    return Scalars(
      self.optimizer.learning_rate,
      self.meta.learning_rate,
      self.transfer.beta,
      self.losses,
    )

  def with_scalars(self, scalars: Scalars) -> Settings:
    """Return the settings with other scalars, which may be traced."""
    return self._replace(
      optimizer=self.optimizer._replace(learning_rate=scalars.learning_rate),
      meta=self.meta._replace(learning_rate=scalars.meta_learning_rate),
      transfer=self.transfer._replace(beta=scalars.beta),
      losses=scalars.losses,
    )


class Experiment(NamedTuple):
  """What is trained: networks, images, losses and numbers."""

  target: models.Network
  images: data.ImageSet
  reading: data.DataFields  # How images become batches.
  settings: Settings
  sources: Mapping[str, Source] = {}
  task: types.Task = objectives.CLASSIFICATION
  target_taps: tuple[str, ...] = ()  # Names or globs; () for the default ones.
  # Fixed transfer weights, which also determine the pairs; None to learn.
  frozen: transfer.TransferMap | None = None
  # Content of config.json; None for that of `describe`.
  description: Mapping[str, Any] | None = None
  # Fields of the description in which a resumed run may differ.
  free_fields: tuple[str, ...] = ()
  # Field of the description that is a path -> digest of the files there. A
  # resumed run may have another path if the digests agree.
  contents: Mapping[str, str] = {}
  label_smoothing: float = 0.0  # In training only.
  batch_norm_groups: int = 1  # See `models.as_apply_fn`.

  @property
  def method(self) -> objectives.Method:
    """The training method that `settings.method` names."""
    return objectives.get_method(self.settings.method)

  @property
  def learns(self) -> tuple[bool, bool]:
    """Whether f and g are learned."""
    fields = self.settings.transfer
    return self.method.learns(
      fields.channel_weights,
      fields.pair_weights,
      is_frozen=self.frozen is not None,
    )

  @property
  def looks_ahead(self) -> bool:
    """Whether weights are learned through a look-ahead."""
    return any(self.learns) and self.method.looks_ahead

  @property
  def has_outer(self) -> bool:
    """Whether the outer loss has images of its own: validation images."""
    bilevel = self.settings.bilevel
    return self.looks_ahead and bilevel.outer_images == "validation"

  @property
  def pair_activation(self) -> str:
    """Activation of g's outputs; without a look-ahead, a softmax over pairs."""
    if self.method.looks_ahead:
      return self.settings.transfer.pair_activation
    return "softmax"

  def largest_pair_weight(self, num_pairs: int) -> float:
    """Return the upper bound of pair weights, or inf."""
    if "afd" in self.method.losses:
      return 1.0  # A softmax over the pairs of a source tap.
    return transfer.largest_pair_weight(self.pair_activation, num_pairs)


def comparable(description: Mapping[str, Any]) -> dict[str, Any]:
  """Return dotted name -> effective value of the fields of a description.

  Args:
    description: of an experiment, or the content of a run's config.json.
  """
  fields = traverse_util.flatten_dict(dict(description), sep=".")
  # Different values of eval_resize can mean the same: 0 stands for a default,
  # and images in memory do not use it.
  size, resize = "data.image_size", "data.eval_resize"
  if size in fields and resize in fields:
    fields[resize] = data.resized_for_evaluation(fields[size], fields[resize])
  return fields


def describe(experiment: Experiment) -> dict[str, Any]:
  """Describe an experiment made of objects in the form of a config.

  Arrays, weights and networks become names with digests, so that a folder that
  holds a run with different ones is recognised.
  """
  sources = {
    name: {
      "weights": _describe(
        source.network, (variables_of(source), source.channels)
      ),
      "taps": as_patterns(source.taps),
      "image_size": source.image_size,
      "mean": source.mean,
      "std": source.std,
      "bands": source.bands,
      "class_names": source.class_names,
    }
    for name, source in experiment.sources.items()
  }
  nothing = {"weights": "", "taps": (), "image_size": 0} | dict.fromkeys(
    ("mean", "std", "bands", "class_names"), ()
  )
  task = "classification"
  if experiment.task is not objectives.CLASSIFICATION:
    codes = [_code_of(getattr(f, "__code__", None)) for f in experiment.task]
    names = map(_name_of_function, experiment.task)
    task = " ".join([*names, fingerprints.fingerprint(codes)])
  target, program, values = experiment.target, "", None
  if target is not None:
    program = models.trace(target, experiment.reading.image_shape).digest
  if isinstance(target, nnx.Module):  # Trained from its current values.
    values = variables_of(Source(target))
  settings = _as_dict(experiment.settings)
  losses = settings.pop("losses")
  described = (
    settings
    | losses
    | {
      "data": _describe_images(experiment.images, experiment.reading),
      "source": sources.pop("", nothing),
      "sources": sources,
      "target": {
        "model": _describe(target, (program, values)),
        "task": task,
        "num_outputs": 0,
        "taps": experiment.target_taps,
        "label_smoothing": experiment.label_smoothing,
        "batch_norm_groups": experiment.batch_norm_groups,
      },
    }
  )
  if experiment.frozen and not experiment.settings.transfer.map:
    digest = fingerprints.fingerprint(experiment.frozen)
    described["transfer"]["map"] = f"map {digest}"
  # Tuples become lists, as if read from a config.json.
  return json.loads(json.dumps(described))


def _describe_images(images, reading):
  """Return the fields of the images; a digest replaces pixels in memory."""
  fields = dataclasses.asdict(reading)
  del fields["in_memory"]  # Not a field of a config.
  parts = (images.train, images.test or images.train)
  if reading.source and any(part.pixels is None for part in parts):
    return fields  # Files, which source, name and path identify.
  arrays = [(part.pixels, part.labels, part.targets) for part in parts]
  told = (arrays, images.num_official_val, images.class_names)
  return fields | {"source": "arrays", "name": fingerprints.fingerprint(told)}


def as_patterns(taps: str | tuple[str, ...]) -> tuple[str, ...]:
  """Return taps as a tuple: a string is a single name or glob."""
  return (taps,) if isinstance(taps, str) else tuple(taps)


def variables_of(source: Source) -> tuple[types.PyTree, types.PyTree]:
  """Return (params, model_state) of a source network.

  Raises:
    errors.InputError: it has no params, and is not an NNX module.
  """
  if source.params is not None:
    return source.params, dict(source.model_state or {})
  if not isinstance(source.network, nnx.Module):
    raise errors.InputError(
      f"source {_name(source.network)} has no params; give its trained params"
    )
  # An NNX module returns its own values: key and shape do not matter.
  return models.init(source.network, jax.random.key(0), (1, 1, 1))


def _as_dict(settings):
  return {
    name: _as_dict(value) if hasattr(value, "_asdict") else value
    for name, value in settings._asdict().items()
  }


def _name(network):
  return getattr(network, "__name__", type(network).__name__)


def _describe(network, more):
  """Name a network so that different ones have different names."""
  digest = fingerprints.fingerprint((models.attributes(network), more))
  return f"{_name(network)} {digest}"


def _code_of(code):
  """Return the bytecode of a function, with that of functions within it."""
  if not hasattr(code, "co_code"):
    return repr(code)
  constants = [_code_of(constant) for constant in code.co_consts]
  return code.co_code.hex(), code.co_names, constants


def _name_of_function(function):
  if hasattr(function, "__qualname__"):
    return f"{function.__module__}.{function.__qualname__}"
  # For example a partial.
  return fingerprints.without_addresses(repr(function))
