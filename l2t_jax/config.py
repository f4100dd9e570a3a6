"""Every field of a config: its default, its meaning and its rule.

`get_config` returns a config with all defaults, and `check` applies the rules.
A config file overrides some of the fields, and the command line overrides
others, as in --config.optimizer.momentum=0.8.
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
import functools
import math
import numbers
import os
from typing import Any, NamedTuple

from flax import traverse_util
import ml_collections

from l2t_jax import errors, models
from l2t_jax.data.rand_augment import MAX_MAGNITUDE
from l2t_jax.method import bilevel, objectives, optimizers, transfer
from l2t_jax.runtime import compilation


class Rule(NamedTuple):
  """A rule that the value of a field has to follow."""

  holds: Callable[[Any], bool]
  must: str  # Completes "it must" in the error message.


class Field(NamedTuple):
  """A field of a config."""

  default: Any  # Also determines the type of the field.
  rule: Rule | None = None
  # Whether a run may be resumed with a different value.
  may_change: bool = False


def one_of(choices: Iterable[str]) -> Rule:
  """Return the rule that a value is one of `choices`."""
  choices = tuple(choices)
  return Rule(choices.__contains__, f"be one of {', '.join(choices)}")


def _is_finite(value):
  return isinstance(value, numbers.Real) and math.isfinite(value)


def _is_whole(value):
  # `bool` is a subclass of `int`.
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


AT_LEAST_0 = Rule(lambda x: x >= 0, "be 0 or more")
AT_LEAST_1 = Rule(lambda x: x >= 1, "be at least 1")
POSITIVE = Rule(lambda x: 0 < x < math.inf, "be finite and more than 0")
NOT_NEGATIVE = Rule(lambda x: 0 <= x < math.inf, "be finite and 0 or more")
FROM_0_TO_1 = Rule(lambda x: 0 <= x <= 1, "be from 0 to 1")
BELOW_1 = Rule(lambda x: 0 <= x < 1, "be at least 0 and less than 1")
FINITE = Rule(lambda x: all(map(_is_finite, x)), "hold finite numbers only")
ALL_POSITIVE = Rule(
  lambda x: all(_is_finite(value) and value > 0 for value in x),
  "hold finite numbers above 0 only",
)
ALL_AT_LEAST_0 = Rule(
  lambda x: all(isinstance(value, int) and value >= 0 for value in x),
  "hold whole numbers from 0 only",
)

# What is trained, and for how long.
EXPERIMENT = {
  # How the target learns:
  #   scratch                         without a source
  #   finetune                        initialised with the source's weights
  #                                   wherever the shapes match
  #   linear_probe, finetune_source   no target network: a linear classifier on
  #                                   the source, which is frozen or fine-tuned
  #   lwf, at, lwf_at                 Learning without Forgetting, attention
  #                                   transfer, both
  #   kd                              knowledge distillation; source and target
  #                                   have the same classes
  #   afd                             attention-based feature distillation: pair
  #                                   weights learned together with the target
  #   aft                             adaptive feature transfer: one learned
  #                                   weight per channel of the last features
  #   fm_single, fm_one_to_one,       feature matching with fixed weights
  #   fm_all_to_all
  #   fm_search                       the same, with pairs that the table
  #                                   searches for; elsewhere, transfer.pairs
  #   l2t_w_single, l2t_w_one_to_one  feature matching with learned channel
  #                                   weights
  #   l2t_ww                          the paper's method: learned channel and
  #                                   pair weights
  #   l2t_ww_joint                    l2t_ww without a look-ahead: the weights
  #                                   minimise the loss of the target's update;
  #                                   pair weights are a softmax over pairs
  # lwf, at and kd can be combined with one fm_* or l2t_* method, as in
  # kd+l2t_ww.
  "method": Field("l2t_ww"),
  # Seed of the initial parameters, the order of the images and their
  # augmentation. The split has its own seed, data.split_seed.
  "seed": Field(0, Rule(lambda x: 0 <= x < 2**32, "be 0 or more, below 2**32")),
  # With optimizer.schedule=constant, a run may be continued with more epochs.
  "epochs": Field(200, AT_LEAST_1),
  # Folder of another run, whose newest checkpoint initialises the target, the
  # regressors and the meta-networks; "" for none.
  "init_from": Field(""),
  # Labelled images per iteration, over all devices.
  "batch_size": Field(128, AT_LEAST_1),
  # f32, tf32 (TF32 matrix products on tensor cores) or bf16 (bfloat16
  # activations).
  "precision": Field("f32", one_of(compilation.PRECISIONS)),
  # Shard the parameters and the optimizer state over the devices, for networks
  # that do not fit on one. Results stay the same, up to rounding.
  "shard_params": Field(False, may_change=True),
  # What to do when a loss or gradient is NaN or infinite: stop ends the run and
  # names the iteration; skip discards the update of that iteration.
  "bad_numbers": Field("stop", one_of(("stop", "skip")), may_change=True),
}

# The images. Rules that involve several of these fields are in l2t_jax/data.
DATA = {
  # Where the images come from: bundled, npz, folder, tfds or huggingface.
  "data.source": Field("tfds"),
  # Name of a bundled ("mnist", "digits") or tfds data set, or of one on the
  # Hugging Face Hub, such as "uoft-cs/cifar100".
  "data.name": Field(""),
  # Path of the npz file, of the folder of images, of tfds's data_dir ("" for
  # its default), or of a Hugging Face data set on disk, in place of a name.
  "data.path": Field(""),
  # Columns of a Hugging Face data set; "" if there is only one column of images
  # and only one of type ClassLabel.
  "data.image_column": Field(""),
  "data.label_column": Field(""),
  # Labels to keep, renumbered from 0 in this order; () for all.
  "data.classes": Field(()),
  # Images are resized to this height and width, in pixels.
  "data.image_size": Field(32, AT_LEAST_1),
  # 1 (grey) or 3 (RGB); or the number of channels of the images in an npz file.
  "data.channels": Field(3, AT_LEAST_1),
  # Mean and standard deviation of the pixels, on a scale from 0 to 1; for
  # arrays of floats, on the scale of the arrays. The defaults are ImageNet's.
  # () computes them from the training images, if these are arrays or are kept
  # in memory.
  "data.mean": Field((0.485, 0.456, 0.406), FINITE),
  "data.std": Field((0.229, 0.224, 0.225), ALL_POSITIVE),
  # none, crop (pad, then crop at random) or crop_flip; for streamed images none
  # or random_resized_crop_flip.
  "data.augment": Field("crop_flip"),
  # Pixels added on each side before the random crop.
  "data.crop_padding": Field(4, AT_LEAST_0),
  # RandAugment after the crop: operations per image, such as 2, and their
  # magnitude, from 0 to 30. For 8-bit images, grey or RGB.
  "data.rand_augment": Field(0, AT_LEAST_0),
  "data.rand_augment_magnitude": Field(
    9, Rule(lambda x: 0 <= x <= MAX_MAGNITUDE, "be from 0 to 30")
  ),
  # Largest relative change of brightness, contrast and saturation, such as 0.4.
  # For 8-bit images, grey or RGB.
  "data.color_jitter": Field(0.0, FROM_0_TO_1),
  # Probability that a random rectangle of an image is erased, such as 0.25.
  "data.random_erasing": Field(0.0, FROM_0_TO_1),
  # α of mixup, such as 0.8, and of CutMix, such as 1.0; 0 for none. Only for
  # classification. If both are set, each image gets one of them, with equal
  # probability. The sources see the same mixed images as the target.
  "data.mixup": Field(0.0, NOT_NEGATIVE),
  "data.cutmix": Field(0.0, NOT_NEGATIVE),
  # In evaluation, the short side of streamed images is resized to this many
  # pixels before the central crop; 0 for 8/7 of image_size (256 for 224).
  "data.eval_resize": Field(0, AT_LEAST_0),
  # An npz file with the indices {split_prefix}_train, {split_prefix}_val and
  # {split_prefix}_test; "" to draw a stratified split.
  "data.split_file": Field(""),
  "data.split_prefix": Field(""),
  # Shares of the training images that are split off for validation and for
  # testing if the data set has no such split, and the seed of the random split.
  "data.val_fraction": Field(0.1),
  "data.test_fraction": Field(0.2),
  "data.split_seed": Field(0, AT_LEAST_0),
  # Labelled training images per class; 0 for all.
  "data.per_class": Field(0, AT_LEAST_0),
  # Also transfer features on unlabelled images: the training images that
  # per_class leaves over, or all images in the folder unlabeled_path. They do
  # not enter L_org, and scratch ignores them.
  "data.unlabeled": Field(False),
  "data.unlabeled_path": Field(""),
  # Unlabelled images per iteration; 0 for batch_size.
  "data.unlabeled_batch_size": Field(0, AT_LEAST_0),
  # Number of processes that decode streamed images; 0 to decode in threads.
  "data.num_workers": Field(8, AT_LEAST_0, may_change=True),
  # What to do when images cannot be read: stop lists all of them; skip leaves
  # them out, provided they are at most max_bad_fraction of all images.
  "data.bad_images": Field("stop", one_of(("stop", "skip"))),
  "data.max_bad_fraction": Field(0.01, BELOW_1),
}

# The source network. For several sources, use `sources` instead: a dict of
# source name -> these fields. A config file adds an entry with
# `config.sources.NAME = default.source()`.
SOURCE = {
  # Weights of the source network: a file written by
  # `python -m l2t_jax.pretrained`, or target.safetensors of another run. The
  # file also stores which network it is.
  "weights": Field(""),
  # Taps of the source, with the syntax of target.taps. Pairs listed explicitly
  # in transfer.pairs may use any other tap of the network too.
  "taps": Field(()),
  # Height and width, in pixels, of the source's input; 0 for the size stored in
  # the weight file, or for data.image_size if the file has none.
  "image_size": Field(0, AT_LEAST_0),
  # Normalisation of the source's input; () for the one stored in the weight
  # file, or for that of the data if the file has none.
  "mean": Field((), FINITE),
  "std": Field((), ALL_POSITIVE),
  # Indices, from 0, of the image channels that are fed to the source, in the
  # order that it expects; () for all channels, where grey is converted to RGB
  # and RGB to grey if needed.
  "bands": Field((), ALL_AT_LEAST_0),
  # Class names in the order of the source's logits, for kd, which matches
  # classes by name; () for the names stored in the weight file.
  "class_names": Field(()),
}

# The target network.
TARGET = {
  # A network of `l2t_jax.models`; or "package.module:function", a function that
  # takes num_classes and returns a Linen module, or takes num_classes and rngs
  # and returns an NNX module.
  "target.model": Field("vgg9"),
  # What the target learns from labelled images: classification (cross-entropy),
  # or your own `l2t_jax.types.Task` as "package.module:NAME".
  "target.task": Field("classification"),
  # Number of outputs of the network (its num_classes); 0 for the number of
  # classes. Must be set for a custom task with several targets per image.
  "target.num_outputs": Field(0, AT_LEAST_0),
  # Label smoothing: the share of a label's weight that is spread evenly over
  # all outputs. Used in training only.
  "target.label_smoothing": Field(0.0, BELOW_1),
  # Number of equal parts of each training batch that are normalised separately
  # (ghost batch normalisation). If it is a multiple of the number of devices,
  # the forward and backward pass of batch norm need no communication.
  "target.batch_norm_groups": Field(1, AT_LEAST_1),
  # Taps of the target: names of layers, or globs such as "stages_*/blocks_2".
  # () for the network's default taps or, if it defines none, for the last block
  # of each resolution. `python -m l2t_jax.models MODEL` lists the layers.
  "target.taps": Field(()),
}

# Matching of features.
TRANSFER = {
  # Which source and target taps are compared: single (the last ones),
  # one_to_one (those of equal resolution), nearest (each target tap with the
  # source tap of the nearest resolution), all_to_all, or a list such as
  # "stage1_block5->conv2, stage3_block5->conv8". "" for the method's default.
  "transfer.pairs": Field(""),
  # Weight β of the matching loss.
  "transfer.beta": Field(0.5, POSITIVE),
  # For ablations: uniform and constant (1) replace the weights that the method
  # would learn.
  "transfer.channel_weights": Field("learned", one_of(("learned", "uniform"))),
  "transfer.pair_weights": Field("learned", one_of(("learned", "constant"))),
  # Activation of g's output, which becomes the pair weight: relu6, relu,
  # softplus, or softmax over the pairs, times their number.
  "transfer.pair_activation": Field("relu6", one_of(transfer.PAIR_ACTIVATIONS)),
  # std: divide the features of each source tap by their standard deviation over
  # training images, so that β is comparable across sources; none: do not scale.
  "transfer.feature_scale": Field("none", one_of(("none", "std"))),
  # Path of another run's transfer_map.json, whose pairs are matched with its
  # mean weights; these are not trained further. "" to learn the weights.
  "transfer.map": Field(""),
}

# The losses of the baselines, one group of fields per loss.
LOSSES = {
  # Learning without Forgetting: a second head imitates the source's outputs,
  # softened by the temperature.
  "lwf.temperature": Field(2.0, POSITIVE),
  "lwf.weight": Field(1.0, POSITIVE),
  # Attention transfer: weight of the loss.
  "at.beta": Field(1000.0, POSITIVE),
  # Knowledge distillation: temperature of both softmaxes, weight of the loss.
  "kd.temperature": Field(4.0, POSITIVE),
  "kd.weight": Field(1.0, POSITIVE),
  # Attention-based feature distillation: weight of the loss, and dimension of
  # queries and keys.
  "afd.weight": Field(200.0, POSITIVE),
  "afd.dim": Field(128, AT_LEAST_1),
  # Adaptive feature transfer: weight of the loss.
  "aft.weight": Field(10.0, POSITIVE),
}

LOSS_GROUPS = tuple({name.partition(".")[0]: None for name in LOSSES})
# Group of fields -> the entry of `objectives.Method.losses` that reads them.
_LOSS_OF_GROUP = {name: name for name in LOSS_GROUPS} | {"at": "attention"}

# optimizer: the inner optimizer, of the target's update and the look-ahead.
# meta: Adam, which trains the meta-networks f and g.
OPTIMIZERS = {
  # sgd (L2 regularisation in the gradient), adamw (decoupled weight decay), or
  # "package.module:function", a function that maps a (traced) learning rate to
  # an optax transformation; momentum, b2, weight_decay and decayed are then
  # ignored.
  "optimizer.name": Field("sgd"),
  "optimizer.learning_rate": Field(0.1, POSITIVE),
  # The learning rate of each epoch: cosine (decays to 0), step (divided by 10
  # after 50 % and 75 % of the epochs) or constant.
  "optimizer.schedule": Field("cosine", one_of(optimizers.SCHEDULES)),
  # Linear warm-up to optimizer.learning_rate, in iterations or in epochs (set
  # only one of them). The schedule covers the rest of the run.
  "optimizer.warmup_steps": Field(0, AT_LEAST_0),
  "optimizer.warmup_epochs": Field(0.0, NOT_NEGATIVE),
  # Momentum of sgd or b1 of adamw; and the decay rate of adamw's second moment.
  "optimizer.momentum": Field(0.9, BELOW_1),
  "optimizer.b2": Field(0.999, BELOW_1),
  "optimizer.weight_decay": Field(1e-4, NOT_NEGATIVE),
  # Parameters with weight decay: all, or kernels (which excludes biases, scales
  # and other vectors, but not the tokens and positions of a transformer).
  "optimizer.decayed": Field("all", one_of(optimizers.DECAYED)),
  # Largest global norm of the gradient (clipping); 0 for no clipping.
  "optimizer.clip_norm": Field(0.0, NOT_NEGATIVE),
  # Decay rate per iteration, such as 0.999, of an exponential moving average of
  # the target, which is then evaluated and exported in place of the target; 0
  # for none.
  "optimizer.ema_decay": Field(0.0, BELOW_1),
  "meta.learning_rate": Field(1e-4, POSITIVE),
  # L2 regularisation: added to the gradient, not decoupled as in AdamW.
  "meta.weight_decay": Field(1e-4, NOT_NEGATIVE),
  # Largest global norm of the hypergradient (clipping); 0 for no clipping.
  "meta.clip_norm": Field(0.0, NOT_NEGATIVE),
  # Iterations per meta update.
  "meta.update_every": Field(1, AT_LEAST_1),
}

# The look-ahead and its derivative.
BILEVEL = {
  # T, the number of steps of the look-ahead.
  "bilevel.num_inner_steps": Field(2, AT_LEAST_1),
  # Loss of these T steps: auxiliary (L_wfm, followed by one step with L_org, as
  # in the paper), or total (L_org + L_wfm, the usual bilevel scheme).
  "bilevel.look_ahead_loss": Field("auxiliary", one_of(("auxiliary", "total"))),
  # Images of the outer loss, L_org after the look-ahead: batch (those of the
  # iteration, as in the paper), or validation (as many validation images, the
  # usual choice in bilevel optimisation). The validation accuracy of a run with
  # validation images is optimistic.
  "bilevel.outer_images": Field("batch", one_of(("batch", "validation"))),
  # How the hypergradient is computed: reverse, remat, mixed or linearized. auto
  # uses linearized, the fastest, or mixed if linearized needs too much memory.
  "bilevel.mode": Field("auto", one_of(("auto", *bilevel.MODES))),
  # scan: the compile time does not depend on T. unroll: about 10 % faster on
  # CPU from T = 4 on.
  "bilevel.loop": Field("scan", one_of(("scan", "unroll"))),
}

# What a run records.
RECORDS = {
  # Where metrics go in addition to metrics.jsonl: tensorboard, wandb, mlflow.
  # The last two have to be installed separately, and find their server through
  # their own environment variables.
  "trackers": Field(("tensorboard",), may_change=True),
  # Iterations per record in metrics.jsonl.
  "log_every": Field(20, AT_LEAST_1, may_change=True),
  # Epochs per checkpoint.
  "checkpoint_every": Field(1, AT_LEAST_1, may_change=True),
  # Iterations per additional checkpoint within an epoch; 0 for none.
  "checkpoint_steps": Field(0, AT_LEAST_0, may_change=True),
  # Also evaluate the test images after each epoch whose validation accuracy is
  # the best so far. Set it to False in runs that select hyper-parameters.
  "evaluate_test": Field(True),
}

# All fields, by their names on the command line.
FIELDS: Mapping[str, Field] = {
  **EXPERIMENT,
  **DATA,
  **{f"source.{name}": field for name, field in SOURCE.items()},
  "sources": Field({}),
  **TARGET,
  **TRANSFER,
  **LOSSES,
  **OPTIMIZERS,
  **BILEVEL,
  **RECORDS,
}

# Fields that are paths of files or folders. The weights of the sources are
# paths too: `source_configs` finds them.
PATHS = (
  "init_from",
  "data.path",
  "data.split_file",
  "data.unlabeled_path",
  "transfer.map",
)
# Fields that may differ between a run and its resumption.
FREE_FIELDS = tuple(name for name in FIELDS if FIELDS[name].may_change)


def get_config() -> ml_collections.ConfigDict:
  """Return all fields at their defaults."""
  return _defaults(FIELDS)


def source() -> ml_collections.ConfigDict:
  """Return the fields of a source network at their defaults."""
  return _defaults(SOURCE)


def _defaults(declared):
  values = {name: field.default for name, field in declared.items()}
  return ml_collections.ConfigDict(
    traverse_util.unflatten_dict(values, sep=".")
  )


def check(
  config: ml_collections.ConfigDict,
  *,
  names_objects: bool = True,
) -> None:
  """Check that the values of all fields are valid.

  Args:
    config: the fields.
    names_objects: True if the target, its task and the sources are looked up
      by the names in the config; False if `fit` got them as objects.

  Raises:
    errors.InputError: a value is wrong; the message names the field, its value
      and what would be right.
  """
  for name, value in flatten(config.to_dict()).items():
    field = FIELDS.get(_name_in_table(name))
    if field and type(field.default) is int and not _is_whole(value):
      raise errors.InputError(
        f"config.{name} is {value!r}; it must be a whole number"
      )
    if field and field.rule and not _holds(field.rule, value):
      raise errors.InputError(
        f"config.{name} is {value!r}; it must {field.rule.must}"
      )
  for name in ("batch_size", "data.unlabeled_batch_size"):
    size, groups = get(config, name), config.target.batch_norm_groups
    if size % groups:
      raise errors.InputError(
        f"config.{name} is {size}; it must be a multiple of"
        f" config.target.batch_norm_groups, {groups}"
      )
  method = objectives.get_method(config.method)
  _check_optimizer(config.optimizer)
  if names_objects:
    models.find(config.target.model)
    objectives.get_task(config.target.task)
    _check_sources(config, method)
  if config.transfer.map:
    _check_map(config, method)
  elif method.searches_pairs and not config.transfer.pairs:
    raise errors.InputError(
      f"method {config.method!r} needs config.transfer.pairs;"
      " python -m l2t_jax.table searches for them"
    )


def _holds(rule, value):
  try:
    return rule.holds(value)
  except TypeError:  # A config passed to `fit` can hold values of any type.
    return False


def _check_optimizer(fields):
  if fields.warmup_steps and fields.warmup_epochs:
    raise errors.InputError(
      f"config.optimizer.warmup_steps is {fields.warmup_steps}, and"
      f" warmup_epochs is {fields.warmup_epochs}; set only one of the two"
    )
  optimizers.make(
    fields.name,
    momentum=fields.momentum,
    b2=fields.b2,
    weight_decay=fields.weight_decay,
  )


def _check_sources(config, method):
  if config.sources and config.source.weights:
    raise errors.InputError(
      "config.source.weights and config.sources are both set; set the first for"
      " one source, the second for several"
    )
  method.check_sources(source_configs(config))
  for name, fields in source_configs(config).items():
    path = f"config.sources.{name}" if name else "config.source"
    missing = [field for field in SOURCE if field not in fields]
    if missing:
      raise errors.InputError(
        f"{path} lacks {', '.join(missing)}; start from default.source()"
      )
    if method.needs_source and not fields.weights:
      raise errors.InputError(
        f"method {config.method!r} needs {path}.weights: a file made by"
        " python -m l2t_jax.pretrained, or target.safetensors of another run"
      )


def _check_map(config, method):
  """Reject a map that the method ignores, and fields that the map overrides."""
  if method.pair_set is not None and "matching" not in method.losses:
    raise errors.InputError(
      f"config.transfer.map is {config.transfer.map!r}, but method"
      f" {config.method!r} has no pair weights; use l2t_ww"
    )
  for name in ("pairs", "channel_weights", "pair_weights"):
    default = FIELDS[f"transfer.{name}"].default
    if config.transfer[name] != default:
      raise errors.InputError(
        f"config.transfer.map is {config.transfer.map!r} and decides what"
        f" config.transfer.{name} would; leave that at {default!r}"
      )


def check_fields(names: Iterable[str]) -> None:
  """Check that all names are those of fields.

  Args:
    names: names such as "config.epochs".

  Raises:
    errors.InputError: a field is unknown; the message names the nearest one.
  """
  for name in names:
    if _name_in_table(name.removeprefix("config.")) not in FIELDS:
      known = [f"config.{field}" for field in FIELDS]
      nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
      raise errors.InputError(
        f"unknown field {name}; did you mean {nearest}? l2t_jax/config.py"
        " lists all fields"
      )


def _name_in_table(name):
  """Return a field's key in `FIELDS`: sources.NAME.taps -> source.taps."""
  parts = name.split(".")
  if parts[0] == "sources" and len(parts) == 3:
    return f"source.{parts[2]}"
  return name


def reads(config: ml_collections.ConfigDict, field: str) -> bool:
  """Return whether the method of a config reads a field.

  Args:
    config: the fields.
    field: its dotted name.
  """
  method, fields = objectives.get_method(config.method), config.transfer
  learns_channels, learns_pairs = method.learns(
    fields.channel_weights, fields.pair_weights, is_frozen=bool(fields.map)
  )
  learns = learns_channels or learns_pairs
  # Listed pairs may use any tap.
  is_listed = fields.map or "->" in fields.pairs
  selects_taps = method.pair_set is not None and not is_listed
  group, _, name = field.partition(".")
  if group in _LOSS_OF_GROUP:
    return _LOSS_OF_GROUP[group] in method.losses
  if group == "transfer":
    return {
      "beta": "matching" in method.losses,
      "map": "matching" in method.losses,
      "pairs": method.pair_set is not None and not fields.map,
      "channel_weights": method.learn_channels and not fields.map,
      "pair_weights": method.learn_pairs and not fields.map,
      "pair_activation": learns_pairs and method.looks_ahead,
      "feature_scale": method.pair_set is not None,
    }[name]
  return {
    "meta": learns,
    "bilevel": learns and method.looks_ahead,
    "source": selects_taps if name == "taps" else method.needs_source,
    "sources": (
      selects_taps if name.endswith(".taps") else method.needs_source
    ),
    "target": {
      "model": method.trains == "target",
      "taps": selects_taps,
    }.get(name, True),
    "data": bool(method.losses) or not name.startswith("unlabeled"),
  }.get(group, True)


def source_configs(
  config: ml_collections.ConfigDict,
) -> dict[str, ml_collections.ConfigDict]:
  """Return source name -> its fields; a single source is named ""."""
  return dict(config.sources.items()) or {"": config.source}


def expand_home(config: ml_collections.ConfigDict) -> None:
  """Expand a leading ~ in all fields that are paths; changes `config`."""
  for name in PATHS:
    group, _, field = name.rpartition(".")
    fields = get(config, group) if group else config
    fields[field] = os.path.expanduser(fields[field])
  for fields in source_configs(config).values():
    if "weights" in fields:
      fields.weights = os.path.expanduser(fields.weights)


def get(config: ml_collections.ConfigDict, field: str) -> Any:
  """Return the value of a field by its dotted name."""
  return functools.reduce(getattr, field.split("."), config)


def flatten(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Return dotted name -> value of nested fields."""
  return traverse_util.flatten_dict(dict(fields), sep=".")
