"""Every field of a config: its default, its meaning and its rule.

`get_config` builds a config of the defaults, and `check` applies the rules. A
config file changes some of the fields; so does the command line, as in
--config.optimizer.momentum=0.8.
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
  """What is allowed in a field."""

  holds: Callable[[Any], bool]
  must: str  # Completes "it must".


class Field(NamedTuple):
  """A field of a config."""

  default: Any  # Gives the field its type, too.
  rule: Rule | None = None
  # Whether a run may be resumed with another value.
  may_change: bool = False


def one_of(choices: Iterable[str]) -> Rule:
  """Allow some names."""
  choices = tuple(choices)
  return Rule(choices.__contains__, f"be one of {', '.join(choices)}")


def _is_finite(value):
  return isinstance(value, numbers.Real) and math.isfinite(value)


def _is_whole(value):
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_method(name):
  try:
    objectives.get_method(name)
  except errors.InputError:
    return False
  return True


METHOD = Rule(
  _is_method,
  f"be one of {', '.join(objectives.METHODS)}, or one that matches features and"
  f" some of {', '.join(objectives.ADDABLE)}, such as kd+l2t_ww",
)
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

# What is trained, and how long.
EXPERIMENT = {
  # How the target learns:
  #   scratch                         without a source
  #   finetune                        from the source's weights, where the
  #                                   shapes agree
  #   linear_probe, finetune_source   no target: a linear classifier on the
  #                                   frozen source, or on one that is trained
  #   lwf, at, lwf_at                 Learning without Forgetting, attention
  #                                   transfer, both
  #   kd                              knowledge distillation, where the classes
  #                                   agree
  #   afd                             attention-based feature distillation: pair
  #                                   weights learned with the target
  #   aft                             adaptive feature transfer: learned weights
  #                                   of the last features' channels
  #   fm_single, fm_one_to_one,       feature matching with fixed weights
  #   fm_all_to_all
  #   fm_search                       the same, with pairs that the table
  #                                   searches for; elsewhere, transfer.pairs
  #   l2t_w_single, l2t_w_one_to_one  feature matching with learned channel
  #                                   weights
  #   l2t_ww                          the paper's method: learned channel and
  #                                   pair weights
  #   l2t_ww_joint                    the same without a look-ahead: the weights
  #                                   descend the target's loss; pairs compete
  # lwf, at and kd can be added to one of fm_* and l2t_*, as in kd+l2t_ww.
  "method": Field("l2t_ww", METHOD),
  # Seed of the initial values, the order of the images and their augmentation.
  # The split has a seed of its own.
  "seed": Field(0, Rule(lambda x: 0 <= x < 2**63, "be 0 or more, below 2**63")),
  # With the schedule constant, a run may go on with more epochs.
  "epochs": Field(200, AT_LEAST_1),
  # Folder of a run whose target, regressors and meta-networks this one starts
  # from, as its newest checkpoint has them; "" to start afresh.
  "init_from": Field(""),
  # Labelled images per iteration, over all devices.
  "batch_size": Field(128, AT_LEAST_1),
  # f32, tf32 (matrix products on tensor cores) or bf16 (activations).
  "precision": Field("f32", one_of(compilation.PRECISIONS)),
  # Split the parameters and the optimizer's state over the devices, for
  # networks that do not fit on one. The numbers stay the same.
  "shard_params": Field(False, may_change=True),
  # What happens where a loss or gradient is NaN or infinite: stop ends the run
  # and names the iteration; skip leaves everything as it was before.
  "bad_numbers": Field("stop", one_of(("stop", "skip")), may_change=True),
}

# The images. Rules about several of these fields are in l2t_jax/data.
DATA = {
  # Where they come from: bundled, npz, folder, tfds or huggingface.
  "data.source": Field("tfds"),
  # Name of a bundled ("mnist", "digits") or tfds data set, or of one on the hub
  # of Hugging Face, such as "uoft-cs/cifar100".
  "data.name": Field(""),
  # The npz file, the folder of images, tfds's data_dir ("" for its own), or a
  # Hugging Face data set on disk, instead of its name.
  "data.path": Field(""),
  # Columns of a Hugging Face data set; "" for the only one that holds images,
  # and the only one of type ClassLabel.
  "data.image_column": Field(""),
  "data.label_column": Field(""),
  # Labels to keep, renumbered from 0 in this order; () for all.
  "data.classes": Field(()),
  # Height and width in pixels that images are resized to.
  "data.image_size": Field(32, AT_LEAST_1),
  # 1 (grey) or 3 (RGB); or the channels of the images in an npz file.
  "data.channels": Field(3, AT_LEAST_1),
  # Normalisation of the pixels, on a scale of 0 to 1, for arrays of floats on
  # their own. These are ImageNet's. () is that of the training images, if they
  # are arrays or stay in memory.
  "data.mean": Field((0.485, 0.456, 0.406), FINITE),
  "data.std": Field((0.229, 0.224, 0.225), ALL_POSITIVE),
  # none, crop (pad and crop) or crop_flip; for streamed images none or
  # random_resized_crop_flip.
  "data.augment": Field("crop_flip"),
  # Pixels added on each side before the random crop.
  "data.crop_padding": Field(4, AT_LEAST_0),
  # RandAugment after the crop: operations per image, such as 2, and their
  # magnitude from 0 to 30; for images of 8 bits, grey or RGB.
  "data.rand_augment": Field(0, AT_LEAST_0),
  "data.rand_augment_magnitude": Field(
    9, Rule(lambda x: 0 <= x <= MAX_MAGNITUDE, "be from 0 to 30")
  ),
  # Largest relative change of brightness, contrast and saturation, such as 0.4;
  # for the same images.
  "data.color_jitter": Field(0.0, FROM_0_TO_1),
  # Share of the images that lose a rectangle, such as 0.25.
  "data.random_erasing": Field(0.0, FROM_0_TO_1),
  # α of mixup, such as 0.8, and of CutMix, such as 1.0, for classification; 0
  # for none. With both, an image has an even chance of either. Sources see the
  # mixed images, as the target does.
  "data.mixup": Field(0.0, NOT_NEGATIVE),
  "data.cutmix": Field(0.0, NOT_NEGATIVE),
  # Length of the short side of streamed images before the central crop in
  # evaluation; 0 for 8/7 of image_size, which makes 256 of 224.
  "data.eval_resize": Field(0, AT_LEAST_0),
  # An npz file with the indices {split_prefix}_train, {split_prefix}_val and
  # {split_prefix}_test; "" to draw a stratified split.
  "data.split_file": Field(""),
  "data.split_prefix": Field(""),
  # Shares of the training images that validate and test, where the data set
  # has no images for that, and the seed by which they are drawn.
  "data.val_fraction": Field(0.1),
  "data.test_fraction": Field(0.2),
  "data.split_seed": Field(0, AT_LEAST_0),
  # Labelled training images per class; 0 for all.
  "data.per_class": Field(0, AT_LEAST_0),
  # Add images without labels to those whose features are transferred: the ones
  # that per_class leaves over, or all images in the folder unlabeled_path.
  # L_org and scratch never see them.
  "data.unlabeled": Field(False),
  "data.unlabeled_path": Field(""),
  # Images without labels per iteration; 0 for batch_size.
  "data.unlabeled_batch_size": Field(0, AT_LEAST_0),
  # Processes that decode streamed images; 0 for threads.
  "data.num_workers": Field(8, AT_LEAST_0, may_change=True),
  # What happens where images cannot be read: stop names all of them; skip
  # leaves them out, if they are at most max_bad_fraction of all images.
  "data.bad_images": Field("stop", one_of(("stop", "skip"))),
  "data.max_bad_fraction": Field(0.01, BELOW_1),
}

# The source network. In place of it `sources` holds several: a name and these
# fields for each. A config file adds them, as in
# `config.sources.NAME = default.source()`.
SOURCE = {
  # Weights of the source network: a file that `python -m l2t_jax.pretrained`
  # made, or target.safetensors of another run. The file names the network.
  "weights": Field(""),
  # Its taps, given as in target.taps. Pairs that transfer.pairs lists may use
  # all of the network's taps instead.
  "taps": Field(()),
  # Height and width in pixels of the images that it sees; 0 for those of the
  # data.
  "image_size": Field(0, AT_LEAST_0),
  # Its normalisation; () for that of the run that trained it, or for that of
  # the data if the weights file does not say.
  "mean": Field((), FINITE),
  "std": Field((), ALL_POSITIVE),
  # Which channels of the images it sees, in its order, counted from 0; () for
  # all of them, where grey becomes RGB and RGB becomes grey.
  "bands": Field((), ALL_AT_LEAST_0),
  # Names of its classes in the order of its logits, for kd, which compares
  # classes by name; () for what the weights file says.
  "class_names": Field(()),
}

# The target network.
TARGET = {
  # A network of `l2t_jax.models`; or "package.module:function", a function that
  # takes num_classes and returns a Linen module, or takes num_classes and rngs
  # and returns an NNX module.
  "target.model": Field("vgg9"),
  # What it learns from labelled images: classification (cross-entropy), or a
  # `l2t_jax.types.Task` of your own as "package.module:NAME".
  "target.task": Field("classification"),
  # Outputs of the network (its num_classes); 0 for the number of classes. A
  # task of your own with several targets per image has to set it.
  "target.num_outputs": Field(0, AT_LEAST_0),
  # Share of a label's weight that is spread evenly over all outputs, in
  # training alone.
  "target.label_smoothing": Field(0.0, BELOW_1),
  # Names of its layers, or globs such as "stages_*/blocks_2"; () for the
  # network's own choice, or else for the last block of each resolution.
  # `python -m l2t_jax.models MODEL` lists the layers.
  "target.taps": Field(()),
}

# Matching of features.
TRANSFER = {
  # "" for the method's own; single, one_to_one (equal resolutions), nearest
  # (each target tap with the source tap of the nearest resolution),
  # all_to_all, or a list such as "stage1_block5->conv2, stage3_block5->conv8".
  "transfer.pairs": Field(""),
  # Weight β of the matching loss.
  "transfer.beta": Field(0.5, POSITIVE),
  # uniform and constant (1) switch off what the method would learn.
  "transfer.channel_weights": Field("learned", one_of(("learned", "uniform"))),
  "transfer.pair_weights": Field("learned", one_of(("learned", "constant"))),
  # Turns g's output into a pair weight: relu6, relu or softplus.
  "transfer.pair_activation": Field("relu6", one_of(transfer.PAIR_ACTIVATIONS)),
  # std: divide each source tap by its standard deviation over the training
  # images, so that β means the same for all sources; none: leave it.
  "transfer.feature_scale": Field("none", one_of(("none", "std"))),
  # transfer_map.json of another run: match its pairs with its mean weights,
  # which stay fixed.
  "transfer.map": Field(""),
}

# The losses of other methods, a group of fields for each.
LOSSES = {
  # Learning without Forgetting: a second head imitates the source's outputs,
  # softened by the temperature.
  "lwf.temperature": Field(2.0, POSITIVE),
  "lwf.weight": Field(1.0, POSITIVE),
  # Attention transfer: weight of its loss.
  "at.beta": Field(1000.0, POSITIVE),
  # Knowledge distillation, with outputs softened in the same way.
  "kd.temperature": Field(4.0, POSITIVE),
  "kd.weight": Field(1.0, POSITIVE),
  # Attention-based feature distillation: weight of its loss, and the length of
  # queries and keys.
  "afd.weight": Field(200.0, POSITIVE),
  "afd.dim": Field(128, AT_LEAST_1),
  # Adaptive feature transfer: weight of its loss.
  "aft.weight": Field(10.0, POSITIVE),
}

LOSS_GROUPS = tuple({name.partition(".")[0]: None for name in LOSSES})
# Group of fields -> name of the loss, in `objectives.Method`, that reads them.
_LOSS_OF_GROUP = {name: name for name in LOSS_GROUPS} | {"at": "attention"}

# The optimizer of the target's update and of the look-ahead (optimizer), and
# Adam for the meta-networks f and g (meta).
OPTIMIZERS = {
  # sgd (with L2 in the gradient), adamw (with decoupled weight decay), or
  # "package.module:function", a function of the learning rate (traced) that
  # returns an optax transformation; momentum, b2, weight_decay and decayed are
  # then its own.
  "optimizer.name": Field("sgd"),
  "optimizer.learning_rate": Field(0.1, POSITIVE),
  # By epochs: cosine (to 0), or step (a tenth at 50 % and again at 75 %); or
  # constant.
  "optimizer.schedule": Field("cosine", one_of(optimizers.SCHEDULES)),
  # Iterations, or else epochs, in which the learning rate first grows linearly
  # to its largest value; the schedule has what is left of the run.
  "optimizer.warmup_steps": Field(0, AT_LEAST_0),
  "optimizer.warmup_epochs": Field(0.0, NOT_NEGATIVE),
  # Decay rate of the momentum (b1 of adamw), and of adamw's second moment.
  "optimizer.momentum": Field(0.9, BELOW_1),
  "optimizer.b2": Field(0.999, BELOW_1),
  "optimizer.weight_decay": Field(1e-4, NOT_NEGATIVE),
  # Which parameters decay: all, or kernels (no biases, scales and other
  # vectors; tokens and positions of a transformer do).
  "optimizer.decayed": Field("all", one_of(optimizers.DECAYED)),
  # Gradients are scaled down to this norm over all arrays; 0 for no clipping.
  "optimizer.clip_norm": Field(0.0, NOT_NEGATIVE),
  # Decay rate per iteration of an exponential moving average of the target,
  # such as 0.999, which is evaluated and saved in its place; 0 for none.
  "optimizer.ema_decay": Field(0.0, BELOW_1),
  "meta.learning_rate": Field(1e-4, POSITIVE),
  # Added to the gradient (L2), not to the update.
  "meta.weight_decay": Field(1e-4, NOT_NEGATIVE),
  # As optimizer.clip_norm, for the hypergradient.
  "meta.clip_norm": Field(0.0, NOT_NEGATIVE),
  # Iterations per meta update.
  "meta.update_every": Field(1, AT_LEAST_1),
}

# The look-ahead and its derivative.
BILEVEL = {
  # T, the number of its steps.
  "bilevel.num_inner_steps": Field(2, AT_LEAST_1),
  # What these steps minimise: auxiliary (L_wfm; a step on L_org follows), or
  # total (L_org + L_wfm, the usual bilevel scheme).
  "bilevel.look_ahead_loss": Field("auxiliary", one_of(("auxiliary", "total"))),
  # How the hypergradient is computed: reverse, remat, mixed or linearized. auto
  # is linearized, the fastest, or mixed where that does not fit into memory.
  "bilevel.mode": Field("auto", one_of(("auto", *bilevel.MODES))),
  # scan compiles as fast for any T; unroll is about a tenth faster on CPU from
  # T = 4 on.
  "bilevel.loop": Field("scan", one_of(("scan", "unroll"))),
}

# What a run records.
RECORDS = {
  # Where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow. Install
  # the last two yourself; their environment variables name their server.
  "trackers": Field(("tensorboard",), may_change=True),
  # Iterations per record in metrics.jsonl.
  "log_every": Field(20, AT_LEAST_1, may_change=True),
  # Epochs per checkpoint.
  "checkpoint_every": Field(1, AT_LEAST_1, may_change=True),
  # Iterations per further checkpoint within an epoch; 0 for none.
  "checkpoint_steps": Field(0, AT_LEAST_0, may_change=True),
  # Evaluate the test images, too, at each epoch that is the best so far on the
  # validation images. Runs that choose hyper-parameters leave them alone.
  "evaluate_test": Field(True),
}

# All fields, by the names that they have on the command line.
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

# Fields that may differ between a run and its resumption.
# The fields that are paths of files or folders, beside the sources' weights.
PATHS = (
  "init_from",
  "data.path",
  "data.split_file",
  "data.unlabeled_path",
  "transfer.map",
)
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
  """Refuse values that no run can have.

  Args:
    config: the fields.
    names_objects: whether the target, its task and the sources are what the
      config names, and not objects that are there already.

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
  method = objectives.get_method(config.method)
  _check_optimizer(config.optimizer)
  if names_objects:
    models.find(config.target.model)
    objectives.get_task(config.target.task)
    _check_sources(config, method)
  if config.transfer.map:
    _check_map(config, method)


def _holds(rule, value):
  try:
    return rule.holds(value)
  except TypeError:  # `fit` takes values of any type.
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
  """Refuse a map that is not read, and fields that a map would overrule."""
  if method.pair_set and "matching" not in method.losses:
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
  """Refuse names that are no fields.

  Args:
    names: such as "config.epochs".

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
  """Return the name that declares a field: sources.NAME.taps is source.taps."""
  parts = name.split(".")
  if parts[0] == "sources" and len(parts) == 3:
    return f"source.{parts[2]}"
  return name


def reads(config: ml_collections.ConfigDict, field: str) -> bool:
  """Return whether a field matters to the method of a config.

  Args:
    config: the fields.
    field: its dotted name.
  """
  method, fields = objectives.get_method(config.method), config.transfer
  learned = lambda value: value == "learned" and not fields.map
  learns_channels = method.learn_channels and learned(fields.channel_weights)
  learns_pairs = method.learn_pairs and learned(fields.pair_weights)
  learns = learns_channels or learns_pairs
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
    "source": method.needs_source,
    "sources": method.needs_source,
    "target": method.trains == "target" or name not in ("model", "taps"),
    "data": bool(method.losses) or not name.startswith("unlabeled"),
  }.get(group, True)


def source_configs(
  config: ml_collections.ConfigDict,
) -> dict[str, ml_collections.ConfigDict]:
  """Return name -> fields of all sources; a single one has the name ""."""
  return dict(config.sources.items()) or {"": config.source}


def expand_home(config: ml_collections.ConfigDict) -> None:
  """Replace a leading ~ in the fields that are paths, in place."""
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
