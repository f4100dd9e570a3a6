"""Every field of a config: its default, its meaning and its rule."""

from collections.abc import Iterable, Mapping
import difflib
import functools
import json
import math
from typing import Any

import flax
import ml_collections
from ml_collections import config_dict

from l2t_jax import data, errors, models
from l2t_jax.data import formats
from l2t_jax.method import bilevel, objectives, optimizers, training, transfer
from l2t_jax.runtime import compilation

_LOOPS = ("scan", "unroll")
_BAD_NUMBERS = ("stop", "skip")


def check(
  config: ml_collections.ConfigDict,
  *,
  names_objects: bool = True,
) -> None:
  """Refuse values that no run can have; see l2t_jax/config.py.

  Args:
    config: the fields.
    names_objects: whether the target, its task and the sources are what the
      config names, and not objects that are there already.

  Raises:
    errors.InputError: naming the field, its value and what would be right.
  """
  positive = lambda value: 0 < value < math.inf
  share = lambda value: 0 <= value < 1
  not_negative = lambda value: 0 <= value < math.inf
  rules = (
    ("epochs", positive, "at least 1"),
    ("batch_size", positive, "at least 1"),
    ("log_every", positive, "at least 1"),
    ("checkpoint_every", positive, "at least 1"),
    ("checkpoint_steps", not_negative, "0 or more"),
    ("seed", lambda value: 0 <= value < 2**63, "0 or more, below 2**63"),
    ("target.num_outputs", not_negative, "0 or more"),
    ("bilevel.num_inner_steps", positive, "at least 1"),
    ("transfer.beta", positive, "finite and more than 0"),
    ("lwf.temperature", positive, "finite and more than 0"),
    ("lwf.weight", positive, "finite and more than 0"),
    ("at.beta", positive, "finite and more than 0"),
    ("kd.temperature", positive, "finite and more than 0"),
    ("kd.weight", positive, "finite and more than 0"),
    ("optimizer.learning_rate", positive, "finite and more than 0"),
    ("optimizer.momentum", share, "at least 0 and less than 1"),
    ("optimizer.weight_decay", not_negative, "finite and 0 or more"),
    ("optimizer.clip_norm", not_negative, "finite and 0 or more"),
    ("meta.learning_rate", positive, "finite and more than 0"),
    ("meta.weight_decay", not_negative, "finite and 0 or more"),
    ("meta.clip_norm", not_negative, "finite and 0 or more"),
    ("meta.update_every", positive, "at least 1"),
  )
  for field, holds, right in rules:
    value = get(config, field)
    if not holds(value):
      raise errors.InputError(f"config.{field} is {value}; it must be {right}")
  for field, choices in (
    ("method", objectives.METHODS),
    ("precision", compilation.PRECISIONS),
    ("bad_numbers", _BAD_NUMBERS),
    ("transfer.channel_weights", ("learned", "uniform")),
    ("transfer.pair_weights", ("learned", "constant")),
    ("transfer.pair_activation", transfer.PAIR_ACTIVATIONS),
    ("optimizer.schedule", optimizers.SCHEDULES),
    ("bilevel.look_ahead_loss", training.LOOK_AHEAD_LOSSES),
    ("bilevel.mode", ("auto", *bilevel.MODES)),
    ("bilevel.loop", _LOOPS),
  ):
    if get(config, field) not in choices:
      raise errors.InputError(
        f"config.{field} is {get(config, field)!r}; it must be one of"
        f" {', '.join(choices)}"
      )
  if names_objects:
    models.find(config.target.model)
    objectives.get_task(config.target.task)
  if config.sources and config.source.weights:
    raise errors.InputError(
      "config.source.weights and config.sources are both set; one source goes"
      " into config.source, several into config.sources"
    )
  method = objectives.METHODS[config.method]
  for name, source in source_configs(config).items():
    field = f"config.sources.{name}" if name else "config.source"
    _check_source(source, field, config.source)
    if names_objects and method.needs_source and not source.weights:
      raise errors.InputError(
        f"method {config.method!r} needs {field}.weights: a file made by"
        " python -m l2t_jax.pretrained, or target.safetensors of another run"
      )
  if config.transfer.map:
    if "attention" in method.losses:
      raise errors.InputError(
        f"config.transfer.map is {config.transfer.map!r}, but method"
        f" {config.method!r} matches no features; use l2t_ww"
      )
    _check_map_fields(config.transfer)


def _check_source(source, field, fields):
  different = set(source) ^ set(fields)
  if different:
    raise errors.InputError(
      f"{field} has other fields than config.source: {', '.join(different)};"
      " start from default.source()"
    )
  if source.image_size < 0:
    raise errors.InputError(
      f"{field}.image_size is {source.image_size}; it must be 0 or more"
    )
  formats.check_normalisation(f"{field}.", source.mean, source.std)


def _check_map_fields(fields):
  """Refuse what would be ignored: a map says all of it."""
  for field, usual in (
    ("pairs", ""),
    ("channel_weights", "learned"),
    ("pair_weights", "learned"),
  ):
    if fields[field] != usual:
      raise errors.InputError(
        f"config.transfer.map is {fields.map!r} and decides what"
        f" config.transfer.{field} would; leave that at {usual!r}"
      )


def source_configs(config):
  """Name -> fields; a single source has the name ""."""
  return dict(config.sources.items()) or {"": config.source}


def get(config, field):
  return functools.reduce(getattr, field.split("."), config)


def fields(config: ml_collections.ConfigDict) -> list[str]:
  paths = flax.traverse_util.flatten_dict(config.to_dict())
  return [".".join(("config", *path)) for path in paths]


def check_fields(names: Iterable[str]) -> None:
  """Refuse fields that the default config does not have."""
  known = fields(get_config())
  for name in names:
    name = name.removeprefix("no") if name.startswith("noconfig.") else name
    # Each of several sources has the fields of a single one.
    parts = name.split(".")
    if parts[:2] == ["config", "sources"] and len(parts) == 4:
      parts[1:3] = ["source"]
    if ".".join(parts) not in known:
      nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise errors.InputError(
        f"unknown field {name}; did you mean {nearest}? l2t_jax/config.py"
        " lists all fields"
      )


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()

  # scratch; lwf, at, lwf_at (imitated outputs, attention, both); fm_single,
  # fm_one_to_one, fm_all_to_all (matching with fixed weights); l2t_w_single,
  # l2t_w_one_to_one (learned channel weights); l2t_ww; finetune (where shapes
  # agree); kd (where classes agree).
  config.method = "l2t_ww"
  # Of initialisation, order of images and augmentation; not of the split.
  config.seed = 0
  config.epochs = 200
  # Over all devices.
  config.batch_size = 128
  # f32; tf32 (matrix products on tensor cores); bf16 (activations).
  config.precision = "f32"
  # Whether parameters and optimizer state are split over the devices, too, for
  # networks that do not fit on one; the numbers are the same.
  config.shard_params = False
  # What an iteration with NaN or infinity in a loss or gradient does: stop (the
  # run, which names it), or skip (leaves everything as it was).
  config.bad_numbers = "stop"

  config.data = config_dict.ConfigDict()
  # Where images come from: bundled, npz, folder or tfds.
  config.data.source = "tfds"
  # Name of a bundled ("mnist", "digits") or tfds data set.
  config.data.name = ""
  # The npz file, the folder of images, or tfds's data_dir ("" for its own).
  config.data.path = ""
  # Labels to keep, renumbered from 0; () for all.
  config.data.classes = ()
  # Height and width that images are resized to, in pixels.
  config.data.image_size = 32
  # 1 (grey) or 3 (RGB).
  config.data.channels = 3
  # Of the pixels, on a scale of 0 to 1: ImageNet's.
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  # none, crop (pad and crop), crop_flip, random_resized_crop_flip (streamed).
  config.data.augment = "crop_flip"
  # Pixels on each side before the random crop.
  config.data.crop_padding = 4
  # Streamed images: length of the short side before the centre crop; 0 for 8/7
  # of image_size, 256 where that is 224.
  config.data.eval_resize = 0
  # Index arrays {prefix}_train, {prefix}_val, {prefix}_test; "" for a
  # stratified split of our own.
  config.data.split_file = ""
  config.data.split_prefix = ""
  # Stratified split: shares of the training images, and its seed.
  config.data.val_fraction = 0.1
  config.data.test_fraction = 0.2  # Where there is no official test set.
  config.data.split_seed = 0
  # Labelled training images per class; 0 for all.
  config.data.per_class = 0
  # Whether images without labels join what is transferred: those that
  # per_class leaves over, or all in the folder unlabeled_path. L_org and
  # scratch never see them.
  config.data.unlabeled = False
  config.data.unlabeled_path = ""
  # Of them in an iteration; 0 for batch_size.
  config.data.unlabeled_batch_size = 0
  # Processes that decode streamed images; 0 for threads.
  config.data.num_workers = 8

  config.source = source()
  # Several sources: a name and the fields of config.source for each, in the
  # place of config.source; `config.sources.NAME = default.source()` in a config
  # file.
  config.sources = config_dict.ConfigDict()

  config.target = config_dict.ConfigDict()
  # A network of `l2t_jax.models`, or a function of your own as
  # "package.module:function" that takes num_classes and returns a Linen module,
  # or takes num_classes and rngs and returns an NNX module.
  config.target.model = "vgg9"
  # What it learns from labelled images: classification (cross-entropy), or a
  # l2t_jax.types.Task of your own as "package.module:NAME".
  config.target.task = "classification"
  # Outputs of the network (its num_classes); 0 for the number of classes, which
  # is refused where a task of your own reads several numbers an image.
  config.target.num_outputs = 0
  # Names of its layers, or globs such as "stages_*/blocks_2"; () for the
  # network's own choice, or else the last one of each resolution.
  # `python -m l2t_jax.models MODEL` lists what there is.
  config.target.taps = ()

  config.transfer = config_dict.ConfigDict()
  # "" for the method's own; single, one_to_one (equal resolutions), nearest
  # (each target tap with the source tap of the nearest resolution),
  # all_to_all, or a list such as "stage1_block5->conv2, stage3_block5->conv8".
  config.transfer.pairs = ""
  # Weight of the matching loss.
  config.transfer.beta = 0.5
  # "uniform" and "constant" (1) switch off what the method would learn.
  config.transfer.channel_weights = "learned"
  config.transfer.pair_weights = "learned"
  # What makes a pair weight of g's output: relu6, relu or softplus.
  config.transfer.pair_activation = "relu6"
  # transfer_map.json of another run: its pairs and their mean weights, frozen.
  config.transfer.map = ""

  # Learning without Forgetting: a second head imitates softened outputs.
  config.lwf = config_dict.ConfigDict()
  config.lwf.temperature = 2.0
  config.lwf.weight = 1.0

  # Attention transfer.
  config.at = config_dict.ConfigDict()
  config.at.beta = 1000.0

  # Knowledge distillation.
  config.kd = config_dict.ConfigDict()
  config.kd.temperature = 4.0
  config.kd.weight = 1.0

  # SGD of the real update and of the look-ahead.
  config.optimizer = config_dict.ConfigDict()
  config.optimizer.learning_rate = 0.1
  # By epochs: cosine (to 0), or step (a tenth at 50 % and at 75 %).
  config.optimizer.schedule = "cosine"
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  # Norm over all arrays that gradients are scaled down to; 0 for no clipping.
  config.optimizer.clip_norm = 0.0

  # Adam of the meta-networks, with L2 in the gradient.
  config.meta = config_dict.ConfigDict()
  config.meta.learning_rate = 1e-4
  config.meta.weight_decay = 1e-4
  # Likewise, of the hypergradient.
  config.meta.clip_norm = 0.0
  # Iterations between two meta updates.
  config.meta.update_every = 1

  config.bilevel = config_dict.ConfigDict()
  # T, steps of the look-ahead.
  config.bilevel.num_inner_steps = 2
  # What those steps minimise: auxiliary (L_wfm; one step with L_org follows
  # them), or total (L_org + L_wfm; the usual bilevel scheme).
  config.bilevel.look_ahead_loss = "auxiliary"
  # How the hypergradient is computed: reverse, remat, mixed, linearized; auto
  # is linearized (the fastest), or mixed where that does not fit into memory.
  config.bilevel.mode = "auto"
  # How the look-ahead loops: scan compiles as fast for any T; unroll is about
  # a tenth faster on CPU from T = 4 on.
  config.bilevel.loop = "scan"

  # Where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow; the last
  # two have to be installed, and are told by their environment variables where
  # their server is.
  config.trackers = ("tensorboard",)
  # Iterations between two records of metrics.jsonl.
  config.log_every = 20
  # Epochs between two checkpoints.
  config.checkpoint_every = 1
  # Iterations between two more within an epoch; 0 for none.
  config.checkpoint_steps = 0

  return config


def source() -> config_dict.ConfigDict:
  """Fields of a source network."""
  config = config_dict.ConfigDict()
  # Weights of the source network, from `python -m l2t_jax.pretrained` or
  # "target.safetensors" of an earlier run; they name the network.
  config.weights = ""
  # Its taps, as in target.taps. Pairs that are listed in transfer.pairs choose
  # among all taps instead.
  config.taps = ()
  # Height and width of the images that it sees; 0 for those of the data.
  config.image_size = 0
  # Its normalisation; () for that of the run that trained it, where that is
  # known, or else that of the data.
  config.mean = ()
  config.std = ()
  return config


# Fields that may differ between a run and its resumption.
FREE_FIELDS = (
  "bad_numbers",
  "shard_params",
  "log_every",
  "checkpoint_every",
  "checkpoint_steps",
  "trackers",
  "data.num_workers",
)


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a config by their dotted names, as they work.

  Runs of before a field existed were what its default is.
  """
  usual = json.loads(get_config().to_json())
  fields = _flatten(usual) | _flatten(dict(config))
  fields["data.eval_resize"] = data.resized_for_evaluation(
    fields["data.image_size"], fields["data.eval_resize"]
  )
  return fields


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nested, sep=".")
