"""Sources: read from weight files, and traced for the target's images."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import data, errors, models, types
from l2t_jax.data import image_formats, records
from l2t_jax.method import pair_sets, training, transfer
from l2t_jax.models import weight_files
from l2t_jax.run import experiments
from l2t_jax.runtime import compilation

# Collection of a source's model state: tap -> what its features are divided by.
FEATURE_SCALE = "feature_scale"
# Decay rate and floor of the statistics that standardise a probe's features.
_MOMENTUM, _EPSILON = 0.9, 1e-5


def load_source(
  path: str | os.PathLike[str],
  taps: str | tuple[str, ...] = (),
  *,
  image_size: int = 0,
  mean: Sequence[float] = (),
  std: Sequence[float] = (),
  bands: Sequence[int] = (),
  class_names: Sequence[str] = (),
  precision: str = "f32",
) -> experiments.Source:
  """Read a source from a weight file.

  Args:
    path: the target.safetensors of a run, or what `python -m
      l2t_jax.pretrained` wrote.
    taps: names or globs of layers; () for the default ones.
    image_size: height and width of its images in pixels; 0 for those that the
      file states.
    mean: mean of each channel of its images, on a scale from 0 to 1; () for
      those that the file states.
    std: standard deviation of each channel; () for those that the file states.
    bands: channels of the target's images that it sees; () for all.
    class_names: one per logit; () for those that the file states.
    precision: config.precision of the run.

  Raises:
    errors.InputError: the file is missing or damaged, or holds a converted
      network that takes other images or has another precision.
  """
  path = os.path.expanduser(path)
  if precision not in compilation.PRECISIONS:
    raise errors.InputError(
      f"precision is {precision!r}; it must be one of"
      f" {', '.join(compilation.PRECISIONS)}"
    )
  loaded = weight_files.load_network(
    pathlib.Path(path), compilation.PRECISIONS[precision][0]
  )
  if "taps" in loaded.metadata:
    _check_program(path, loaded.metadata, image_size, (mean, std), precision)
  recorded = functools.partial(_recorded, loaded.metadata)
  return experiments.Source(
    loaded.network,
    loaded.params,
    loaded.model_state,
    experiments.as_patterns(taps),
    image_size or int(loaded.metadata.get("image_size", 0)),
    int(loaded.metadata.get("channels", 0)),
    tuple(mean) or recorded("mean"),
    tuple(std) or recorded("std"),
    tuple(bands),
    tuple(map(str, class_names)) or recorded("class_names"),
    loaded.metadata["num_classes"] != "0",
    str(path),
    # A mean that is given is that of the images at hand.
    int(loaded.metadata["bit_depth"])
    if loaded.metadata.get("dtype") == "uint16" and not mean
    else 0,
  )


def _recorded(metadata, name):
  """Return the tuple that the metadata of a file have; () if they do not."""
  return tuple(json.loads(metadata.get(name, "[]")))


class TracedSource(NamedTuple):
  """A source network that has been traced."""

  name: str  # "" for a single one.
  network: models.Network
  layout: models.Layout
  variables: training.Variables
  image_format: image_formats.ImageFormat  # What the network sees.
  bands: tuple[int, ...]  # Channels of the target's images; () for all.
  num_classes: int  # 0 for a network without a classifier.
  class_names: tuple[str, ...]  # () if unknown.
  patterns: tuple[str, ...]  # Names or globs of its taps.
  class_order: tuple[int, ...] = ()  # Of its logits; () for their own order.

  @property
  def label(self) -> str:
    """How messages call the source."""
    return f"source{self.name and ' '}{self.name}"

  def named(self, taps: Mapping[str, Any]) -> dict[str, Any]:
    """Rename taps to the names that pairs use."""
    return {pair_sets.tap_name(self.name, t): x for t, x in taps.items()}

  def make_apply_fn(
    self, taps: Collection[str], images_from: image_formats.ImageFormat
  ) -> types.ApplyFn:
    """Return a pure function that computes some taps, by their names in pairs.

    It takes images in the target's format and converts them to the source's.
    """
    name = lambda tap: pair_sets.tap_name(self.name, tap)
    apply_fn = models.as_apply_fn(
      self.network, {tap for tap in self.layout.taps if name(tap) in taps}
    )

    def on_target_images(params, model_state, images, *, train):
      if self.bands:
        images = images[..., np.array(self.bands)]
      images = image_formats.convert(
        images, images_from.select(self.bands), self.image_format
      )
      model_state = dict(model_state)
      scales = model_state.pop(FEATURE_SCALE, {})
      logits, features, model_state = apply_fn(
        params, model_state, images, train=train
      )
      if self.class_order:
        logits = logits[:, np.array(self.class_order)]
      scaled = {tap: features[tap] / scale for tap, scale in scales.items()}
      return logits, features | scaled, model_state

    return on_target_images

  def with_scales(self, taps: Collection[str]) -> training.Variables:
    """Return its variables, with a feature scale of 1 for the given taps."""
    names = self.named({tap: tap for tap in self.layout.taps})
    scales = {
      tap: np.float32(1.0) for name, tap in names.items() if name in taps
    }
    params, model_state = self.variables
    return training.Variables(params, {**model_state, FEATURE_SCALE: scales})


def trace(
  experiment: experiments.Experiment, image_format: image_formats.ImageFormat
) -> list[TracedSource]:
  """Trace the sources that an experiment's method needs.

  Args:
    experiment: what is trained.
    image_format: of the target's images; it fills in what a source leaves open.

  Raises:
    errors.InputError: there is no source, or its weights do not fit its
      network.
  """
  if not experiment.method.needs_source:
    return []
  if not experiment.sources:
    raise errors.InputError(
      f"method {experiment.settings.method!r} needs a source, but there is"
      " none; give one, or use the method scratch"
    )
  return [
    trace_one(name, source, image_format)
    for name, source in experiment.sources.items()
  ]


def check_values(
  experiment: experiments.Experiment, values: tuple[float, float]
) -> None:
  """Reject sources that were trained on pixel values of another scale.

  Args:
    experiment: its sources state their normalisation.
    values: smallest and largest pixel value of the images.

  Raises:
    errors.InputError: naming the source.
  """
  if not experiment.method.needs_source:
    return
  for name, source in experiment.sources.items():
    mean, std = source.mean, source.std
    if _is_program(source.network):
      # It normalises the images itself, and expects values from 0 to 1.
      mean = std = (0.5,)
    if mean and std and not image_formats.fits(mean, std, values):
      lowest, highest = values
      raise errors.InputError(
        f"the source {source.origin or name} is normalised by mean"
        f" {_short(mean)} and std {_short(std)}, but the values of the images"
        f" go from {lowest:.4g} to {highest:.4g}; scale the images, or set its"
        " fields mean and std to numbers on their scale"
      )


def check_bit_depth(
  experiment: experiments.Experiment, dataset: data.Dataset
) -> None:
  """Reject sources whose 16-bit images had another pixel value as white.

  Raises:
    errors.InputError: naming the source, with its normalisation on this scale.
  """
  if not experiment.method.needs_source or dataset.dtype != np.uint16:
    return
  white = 2**dataset.bit_depth - 1
  for name, source in experiment.sources.items():
    theirs = 2**source.bit_depth - 1
    if source.bit_depth and theirs != white:
      mean, std = (
        _short(np.multiply(values, theirs / white))
        for values in (source.mean, source.std)
      )
      raise errors.InputError(
        f"{theirs} was white in the images of the source"
        f" {source.origin or name}, but {white} is in these; set its fields"
        f" mean and std to {mean} and {std} (and, in Python, its bit_depth to"
        f" {dataset.bit_depth}): that is the same normalisation"
      )


def in_class_order(
  source: TracedSource, class_names: Sequence[str]
) -> TracedSource:
  """Reorder the logits of a source to match the classes of the data, by name.

  Args:
    source: the source whose logits are distilled.
    class_names: those of the data; further logits of the target have no name.

  Raises:
    errors.InputError: the source has other classes, or does not name them.
  """
  needs = (
    "method 'kd' needs the source's classes to be the target's: the"
    f" {source.label}"
  )
  names = source.class_names
  if not names:
    raise errors.InputError(
      f"{needs} does not name its {source.num_classes} classes; list them in"
      " the order of its logits in its field class_names"
    )
  if len(set(names)) < len(names) or len(names) > source.num_classes:
    raise errors.InputError(
      f"class_names of the {source.label} are {records.some_of(names)}; they"
      f" must be up to {source.num_classes} different names, one per logit"
    )
  different = sorted(set(names) ^ set(class_names))
  if different:
    raise errors.InputError(
      f"{needs} and the data do not both have {records.some_of(different)}; use"
      " 'lwf', or name the source's classes in its field class_names, or those"
      " of the data as class_names of the npz file"
    )
  order = [names.index(name) for name in class_names]
  return source._replace(
    class_order=(*order, *range(len(names), source.num_classes))
  )


def as_target(
  source: TracedSource,
  num_outputs: int,
  images_from: image_formats.ImageFormat,
  *,
  trains: str,
) -> models.Functions:
  """Return the source with a new linear classifier, as a network to train.

  The classifier reads the source's last tap, averaged over positions. For the
  bundled networks that is the input of their own classifier. The features of a
  frozen source are standardised with running statistics, because their scale
  differs by orders of magnitude between networks.

  Args:
    source: the source.
    num_outputs: K, the number of logits.
    images_from: format of the images that the network will be given.
    trains: "classifier" to train that alone: the source is in eval mode, and
      its variables are part of the model state. "source" to train everything.
  """
  tap = models.last_tap(source.layout.taps)
  num_features = source.layout.taps[tap][-1]
  apply_source = source.make_apply_fn(source.named({tap: tap}), images_from)
  frozen = trains == "classifier"
  variables = source.variables

  def init(key):
    classifier = transfer.torch_linear(key, num_features, num_outputs)
    if frozen:
      kept = {"params": variables.params, **variables.model_state}
      statistics = {
        "mean": jnp.zeros(num_features),
        "var": jnp.ones(num_features),
      }
      return {"classifier": classifier}, {
        "source": kept,
        "classifier_stats": statistics,
      }
    params = {"source": variables.params, "classifier": classifier}
    return params, {"source": variables.model_state}

  def apply(params, model_state, images, *, train):
    state = dict(model_state.get("source", {}))
    source_params = state.pop("params") if frozen else params["source"]
    _, features, state = apply_source(
      source_params, state, images, train=train and not frozen
    )
    (last,) = features.values()
    pooled = transfer.mean_over_positions(last)
    model_state = model_state if frozen else {"source": state}
    if frozen:
      pooled, statistics = _standardise(
        pooled, model_state["classifier_stats"], train=train
      )
      model_state = {**model_state, "classifier_stats": statistics}
    classifier = params["classifier"]
    logits = pooled @ classifier["kernel"] + classifier["bias"]
    return logits, {}, model_state

  def fold_in(model_state, number):
    if "source" not in model_state:  # Its own is empty.
      return model_state
    state = models.fold_in(source.network, model_state["source"], number)
    return {**model_state, "source": state}

  return models.Functions(
    init,
    apply,
    digest=getattr(source.network, "digest", ""),
    # A frozen source draws no random numbers.
    fold_in=None if frozen else fold_in,
  )


def _standardise(features, statistics, *, train):
  """Batch normalisation of [B, C] without scale and bias."""
  if train:
    mean, var = jnp.mean(features, axis=0), jnp.var(features, axis=0)
    statistics = {
      name: _MOMENTUM * statistics[name] + (1 - _MOMENTUM) * value
      for name, value in (("mean", mean), ("var", var))
    }
  else:
    mean, var = statistics["mean"], statistics["var"]
  return (features - mean) / jnp.sqrt(var + _EPSILON), statistics


def notes(
  experiment: experiments.Experiment,
  sources: Sequence[TracedSource],
  pairs: Sequence[pair_sets.Pair],
) -> Iterator[str]:
  """Yield one line per source: its images, its classes, its pairs."""
  for source in sources:
    given = experiment.sources[source.name]
    size, channels, mean, std = source.image_format
    sees = f"{size}x{size} images of {channels} channels"
    if not (given.mean and given.std):
      sees += ", normalised as the data's (its own normalisation is not known)"
    elif _is_program(source.network):
      sees += ", which it normalises itself"
    else:
      sees += f", normalised by mean {_short(mean)} and std {_short(std)}"
    name = f"source {given.origin}" if given.origin else source.label
    taps = source.named(source.layout.taps)
    parts = [sees, f"{source.num_classes or 'no'} classes"]
    if pairs:
      parts.append(f"{sum(pair.source in taps for pair in pairs)} pairs")
    yield f"{name}: {'; '.join(parts)}"


def _is_program(network):
  """Return True for a converted network, which normalises its images itself."""
  return bool(getattr(network, "digest", ""))


def _check_program(
  path: str | os.PathLike[str],
  metadata: Mapping[str, str],
  image_size: int,
  normalisation: tuple[Sequence[float], Sequence[float]],
  precision: str,
) -> None:
  """Reject an image size or precision that a converted network lacks."""
  size = int(metadata["image_size"])
  again = f"convert it again, with {{}}: {metadata['command']}"
  if image_size not in (0, size):
    raise errors.InputError(
      f"the image_size of the source {path} is {image_size}, but it was"
      f" converted for {size}; leave it out, or"
      f" {again.format(f'--image_size={image_size}')}"
    )
  own = tuple(_recorded(metadata, name) for name in ("mean", "std"))
  if any(normalisation) and tuple(map(tuple, normalisation)) != own:
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


def trace_one(
  name: str,
  source: experiments.Source,
  image_format: image_formats.ImageFormat,
) -> TracedSource:
  """Trace a source network for images in its own format.

  Args:
    name: of the source; "" for a single one.
    source: the source.
    image_format: of the target's images; it fills in what the source leaves
      open.

  Raises:
    errors.InputError: the source does not fit its weights or the images.
  """
  given = source.origin or name
  if bool(source.mean) != bool(source.std):
    missing, known = ("std", "mean") if source.mean else ("mean", "std")
    raise errors.InputError(
      f"the source {given} has a {known}, {_short(getattr(source, known))}, but"
      f" no {missing}; set both, or none to normalise its images as the data's"
    )
  if not set(source.bands) <= set(range(image_format.channels)):
    raise errors.InputError(
      f"bands of the source {given} are {source.bands}, but the images have"
      f" only the channels 0 to {image_format.channels - 1}"
    )
  selected = image_format.select(source.bands)
  own_format = image_formats.ImageFormat(
    source.image_size or image_format.size,
    source.channels or selected.channels,
    tuple(source.mean) or selected.mean,
    tuple(source.std) or selected.std,
  )
  channels = {selected.channels, own_format.channels}
  if source.bands and len(source.bands) not in (1, own_format.channels):
    raise errors.InputError(
      f"bands of the source {given} are {source.bands}, but it sees"
      f" {own_format.channels}-channel images; list as many"
    )
  if len(channels) > 1 and channels != {1, 3}:
    raise errors.InputError(
      f"the source {given} sees {own_format.channels}-channel images, but the"
      f" target's have {selected.channels} channels; set its field bands to"
      f" the {own_format.channels} that it shall see, in its order and counted"
      " from 0"
    )
  for what, values in (("mean", own_format.mean), ("std", own_format.std)):
    if len(values) not in (1, own_format.channels):
      numbers = sorted({1, own_format.channels})
      raise errors.InputError(
        f"{what} of the source {given} is {values}, but it sees"
        f" images of {own_format.channels} channels; set its field {what} to"
        f" {' or '.join(map(str, numbers))} values"
      )
    if not np.isfinite(values).all() or (what == "std" and min(values) <= 0):
      above = " and above 0" if what == "std" else ""
      raise errors.InputError(
        f"{what} of the source {given} is {values}; it must be finite{above}"
      )
  layout = models.trace(source.network, own_format.shape)
  params, model_state = experiments.variables_of(source)
  if isinstance(source.network, nn.Module) and "rng" in layout.variables:
    # The PRNG key of dropout, which only training reads.
    key = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), layout.variables["rng"]
    )
    model_state = {"rng": key} | model_state
  traced = TracedSource(
    name,
    source.network,
    layout,
    training.Variables(params, model_state),
    own_format,
    tuple(source.bands),
    layout.num_outputs if source.has_classifier else 0,
    source.class_names,
    experiments.as_patterns(source.taps),
  )
  weight_files.check_shapes(
    layout, {"params": params, **model_state}, source.origin or traced.label
  )
  return traced


def _short(values):
  return ", ".join(f"{value:g}" for value in values)
