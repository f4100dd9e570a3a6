"""From a config to data, networks, initial states and iterations.

This module and `experiment` are the ones that know configs; everything below
takes plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent import futures
import contextlib
import functools
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from l2t_jax import data, errors, models, types
import l2t_jax.config
from l2t_jax.data import formats, records
from l2t_jax.method import objectives, optimizers, pair_sets, training, transfer
from l2t_jax.models import weight_files
from l2t_jax.results import transfer_map
from l2t_jax.runtime import compilation, sharding

# The fastest mode, and the one that keeps least between the passes.
_AUTO_MODES = ("linearized", "mixed")
# Folded into the seed's key for initialisation; the data fold in epochs.
_INIT = 2**32 - 1


class SourceNetwork(NamedTuple):
  """A source network with its weights, in the place of a file of them."""

  network: models.Network
  params: types.PyTree
  model_state: types.PyTree
  metadata: Mapping[str, str] = {}


class Given(NamedTuple):
  """Objects in the place of what a config names; None for the config's."""

  data: records.ImageSet | None = None
  # Name -> network; a single source has the name "".
  sources: Mapping[str, SourceNetwork] | None = None
  target: models.Network | None = None
  task: types.Task | None = None


NOTHING = Given()


class Run(NamedTuple):
  """All that the loop needs, made from a config."""

  dataset: data.Dataset
  image_format: formats.ImageFormat
  num_outputs: int  # Of the target.
  sources: dict[str, training.Source]
  source_fns: dict[str, types.ApplyFn]  # On images of the data.
  source_taps: pair_sets.TapShapes
  target_taps: pair_sets.TapShapes
  pairs: tuple[pair_sets.Pair, ...]
  weights_fn: training.WeightsFn | None  # None where no features are matched.
  create_state: Callable[[int], types.TrainState]  # seed -> first state.
  state_shapes: types.TrainState  # `jax.ShapeDtypeStruct`s, with shardings.
  inputs: dict[str, str]  # What training reads -> digits of its contents.
  learns: bool  # Whether there is a meta update.
  # (mode=, update_meta=True) -> `training.make_train_step`.
  make_train_step: Callable[..., Any]
  modes: tuple[str, ...]  # Of the hypergradient; the first that fits is used.
  # Zeros, of the shapes of this process's rows of a batch.
  blank_batch: types.Batch
  eval_step: Any  # `training.make_eval_step`.
  learning_rate_fn: Callable[[int], Any]  # iteration -> learning rate.
  mesh: jax.sharding.Mesh
  notes: tuple[str, ...]  # What the user should be told, a line each.


class _SourceNetwork(NamedTuple):
  """A source network that was loaded."""

  # Taps, named as in pairs -> what computes them from images in the format of
  # the data.
  make_apply_fn: Callable[[Collection[str]], types.ApplyFn]
  variables: training.Source
  image_format: formats.ImageFormat  # Of the images that it sees.
  num_classes: int
  class_names: tuple[str, ...]  # () where they are not known.
  select_taps: Callable[[], pair_sets.TapShapes]  # As configured; see all_taps.
  # Named as in pairs.
  all_taps: dict[str, tuple[int, int, int]]
  no_taps: dict[str, str]  # Other layers, likewise, and why they are none.


class _TargetNetwork(NamedTuple):
  """The network that is trained."""

  network: models.Network
  layout: models.Layout
  init: Callable[[Any], tuple[types.PyTree, types.PyTree]]  # Of a key; jitted.
  start: Callable[[types.PyTree], types.PyTree]  # Fresh variables -> first.
  head_tap: str  # What second heads read, and its channels; "" for no heads.
  num_features: int
  notes: tuple[str, ...]  # On how it trains, and what it starts from.


class _Plan(NamedTuple):
  """What is compared with what, and what is learned."""

  pairs: tuple[pair_sets.Pair, ...] = ()
  source_taps: pair_sets.TapShapes = {}  # noqa: RUF012
  target_taps: pair_sets.TapShapes = {}  # noqa: RUF012
  frozen: transfer.TransferMap | None = None  # Weights that are not learned.
  learn_channels: bool = False
  learn_pairs: bool = False


def check_source_files(
  config: ml_collections.ConfigDict, given: Given = NOTHING
) -> None:
  """Raise `errors.InputError` where a file of weights is missing."""
  needs_source = objectives.METHODS[config.method].needs_source
  if needs_source and given.sources is None:
    for source in l2t_jax.config.source_configs(config).values():
      weight_files.check_exists(pathlib.Path(source.weights))


@compilation.garbage_collection_paused()
def build(config: ml_collections.ConfigDict, given: Given = NOTHING) -> Run:
  """Load data and sources, make networks and iterations.

  Args:
    config: the fields of l2t_jax/config.py, which `check` has seen.
    given: what is there already.

  Raises:
    errors.InputError: for data, weights or values that cannot work together.
  """
  method = objectives.get_method(config.method)
  mesh = sharding.make_mesh()
  _check_devices(config, mesh)
  dataset = _load_data(config, method, given.data)
  image_format = formats.ImageFormat(
    dataset.image_shape[0],
    dataset.image_shape[-1],
    tuple(config.data.mean),
    tuple(config.data.std),
  )
  dtype = l2t_jax.config.PRECISIONS[config.precision][0]
  task = given.task or objectives.get_task(config.target.task)
  networks = {}
  if method.needs_source:
    networks = {
      name: _load_source(
        source, image_format, dtype, name, (given.sources or {}).get(name)
      )
      for name, source in l2t_jax.config.source_configs(config).items()
    }
  network = given.target
  if network is None:
    network = models.create(
      config.target.model,
      config.target.num_outputs or dataset.num_classes,
      dtype,
    )
  target = _make_target(
    network, method, networks, image_format, config.batch_size
  )
  if task is objectives.CLASSIFICATION:
    _check_classification(dataset, target.layout.output_shape)
  elif given.target is None and not config.target.num_outputs:
    _check_num_outputs(dataset, target.layout.output_shape)
  num_outputs = _num_outputs(target.layout)
  plan = _Plan()
  if method.pair_set:
    plan = _plan_transfer(config, method, networks, target.layout)
  optimizer_fn = optimizers.sgd(
    momentum=config.optimizer.momentum,
    weight_decay=config.optimizer.weight_decay,
    clip_norm=config.optimizer.clip_norm,
  )
  meta_optimizer = optimizers.adam_l2(
    config.meta.learning_rate, config.meta.weight_decay, config.meta.clip_norm
  )
  learning_rate_fn = l2t_jax.config.SCHEDULES[config.optimizer.schedule](
    config.optimizer.learning_rate,
    epochs=config.epochs,
    steps_per_epoch=dataset.steps_per_epoch,
  )
  target_fn = models.as_apply_fn(
    target.network, {*plan.target_taps, target.head_tap} - {""}
  )
  if "kd" in method.losses:
    _check_same_classes(networks, num_outputs, dataset.class_names)
  auxiliary = _auxiliary_losses(
    config, method, plan.pairs, networks, target.head_tap, num_outputs
  )

  add_optimizers = jax.jit(
    functools.partial(
      training.create_state,
      optimizer_fn=optimizer_fn,
      meta_optimizer=meta_optimizer,
    )
  )

  def first_state(seed):
    values = _initial_values(seed, method, plan, networks, target)
    return add_optimizers(*values)

  shardings = functools.partial(
    sharding.split if config.shard_params else sharding.copied, mesh=mesh
  )
  place = lambda tree: jax.device_put(tree, shardings(tree))

  # What is split over the devices need not fit on one of them before.
  making = sharding.on_host if config.shard_params else contextlib.nullcontext

  @compilation.garbage_collection_paused()
  def create_state(seed):
    with making():
      state = first_state(seed)
    return place(state)

  shapes = jax.eval_shape(functools.partial(first_state, config.seed))

  source_fns = {
    name: network.make_apply_fn(plan.source_taps)
    for name, network in networks.items()
  }
  weights_fn = (
    _weights_fn(config, plan) if "matching" in method.losses else None
  )
  make_train_step = functools.partial(
    training.make_train_step,
    objectives.make_losses(target_fn, auxiliary, task),
    source_fns,
    pairs=plan.pairs,
    target_taps=plan.target_taps,
    weights_fn=weights_fn,
    look_ahead_loss=config.bilevel.look_ahead_loss,
    num_inner_steps=config.bilevel.num_inner_steps,
    learning_rate_fn=learning_rate_fn,
    optimizer_fn=optimizer_fn,
    meta_optimizer=meta_optimizer,
    rolled=config.bilevel.loop == "scan",
    skip_bad_numbers=config.bad_numbers == "skip",
  )
  return Run(
    dataset=dataset,
    image_format=image_format,
    num_outputs=num_outputs,
    sources={
      name: place(network.variables) for name, network in networks.items()
    },
    source_fns=source_fns,
    source_taps=plan.source_taps,
    target_taps=plan.target_taps,
    pairs=plan.pairs,
    weights_fn=weights_fn,
    create_state=create_state,
    state_shapes=sharding.with_shardings(shapes, shardings(shapes)),
    inputs={
      "the images and labels": dataset.fingerprint,
      **{
        f"the weights of the source{name and ' '}{name}": _digits_of(
          network.variables
        )
        for name, network in networks.items()
      },
    },
    learns=plan.learn_channels or plan.learn_pairs,
    make_train_step=make_train_step,
    modes=_AUTO_MODES
    if config.bilevel.mode == "auto"
    else (config.bilevel.mode,),
    blank_batch=_blank_batch(config, dataset, image_format),
    eval_step=training.make_eval_step(target_fn, task),
    learning_rate_fn=learning_rate_fn,
    mesh=mesh,
    notes=(
      *_source_notes(config, networks, plan.pairs),
      *target.notes,
      *dataset.notes,
    ),
  )


def compile_step(
  run: Run,
  state: types.TrainState,
  batch: types.Batch,
  *,
  num_seeds: int = 1,
  **options: Any,
) -> futures.Future[compilation.Program]:
  """Compile an iteration of a run; its state is donated.

  Args:
    run: from `build`.
    state: of one seed, or of several along a leading axis; or its shapes.
    batch: on the run's mesh; likewise.
    num_seeds: how many train together.
    **options: of `run.make_train_step`.
  """
  step = run.make_train_step(**options)
  if num_seeds > 1:
    step = jax.vmap(step, in_axes=(0, None, 0))
  return compilation.compile_ahead(
    step,
    state,
    run.sources,
    batch,
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda leaf: leaf.sharding, state),
      sharding.replicated(run.mesh),
    ),
  )


def _digits_of(variables):
  """16 hex digits that tell the weights of networks apart."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(variables)):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


def _blank_batch(config, dataset, image_format):
  rows = lambda size: size // jax.process_count()
  images = lambda size: jnp.zeros(
    (rows(size), *image_format.shape), jnp.float32
  )
  unlabeled = None
  if dataset.num_unlabeled:
    unlabeled = images(config.data.unlabeled_batch_size or config.batch_size)
  labels = jnp.zeros(
    (rows(config.batch_size), *dataset.label_shape), dataset.label_dtype
  )
  return types.Batch(images(config.batch_size), labels, unlabeled)


def _source_notes(config, networks, pairs):
  sources = l2t_jax.config.source_configs(config)
  for name, network in networks.items():
    note = f"source {sources[name].weights}, {network.num_classes} classes"
    count = sum(pair.source in network.all_taps for pair in pairs)
    yield f"{note}, {count} pairs" if pairs else note


def _check_devices(config, mesh):
  for field in ("batch_size", "data.unlabeled_batch_size"):
    value = l2t_jax.config.get(config, field)
    if value % mesh.size:
      raise errors.InputError(
        f"config.{field} is {value}; it must be a multiple of the number of"
        f" devices, {mesh.size}"
      )


def _load_data(config, method, opened):
  fields = config.data.to_dict()
  if not method.losses:  # Nothing reads them.
    fields |= {"unlabeled": False, "unlabeled_path": ""}
  dataset = data.load(
    fields.pop("source"),
    **fields,
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    opened=opened,
  )
  if not dataset.num_val:
    raise errors.InputError(
      "there are no validation images to choose the best epoch by; set"
      " config.data.val_fraction above 0"
    )
  return dataset


def _check_classification(dataset, outputs):
  if dataset.label_shape or dataset.label_dtype.kind != "i":
    raise errors.InputError(
      f"the data have targets {dataset.label_dtype}"
      f" {['N', *dataset.label_shape]}, but classification needs a class for"
      " each image; name a task of yours in config.target.task"
    )
  classes = dataset.num_labels
  if classes < 2:
    raise errors.InputError(
      f"the data have {classes} class, {dataset.class_names[0]!r}; to classify,"
      " at least 2 are needed"
    )
  if len(outputs) != 1 or outputs[0] < classes:
    raise errors.InputError(
      f"the target's outputs are {['B', *outputs]}, but the data have"
      f" {classes} classes; it needs a logit for each"
    )


def _check_num_outputs(dataset, outputs):
  """Refuse an output for each class where there are several targets an image.

  A single output would be compared with all of them, by broadcasting. How many
  are right, the user knows: a target may be a class among many.
  """
  if outputs != (dataset.num_classes,) or len(dataset.label_shape) != 1:
    return
  (num_targets,) = dataset.label_shape
  if num_targets not in (1, *outputs):
    raise errors.InputError(
      f"the data have {num_targets} targets for each image, but the target's"
      f" outputs are {['B', *outputs]}; set config.target.num_outputs:"
      f" {num_targets} is one for each target, {outputs[0]} leaves it as it is"
    )


def _load_source(config, image_format, dtype, name, given):
  path = pathlib.Path(config.weights)
  metadata = given.metadata if given else weight_files.read_metadata(path)
  own_format = _source_format(config, metadata, image_format)
  if given:
    network, *variables, _ = given
    layout = models.trace(network, own_format.shape)
    weight_files.check_shapes(
      layout,
      {"params": given.params, **given.model_state},
      f"source{name and ' '}{name}",
    )
  else:
    network, layout, *variables = weight_files.load_network(
      path, own_format.shape, dtype
    )
  named = lambda taps: {pair_sets.tap_name(name, t): taps[t] for t in taps}

  def make_apply_fn(taps):
    wanted = {t for t in layout.taps if pair_sets.tap_name(name, t) in taps}
    apply_fn = models.as_apply_fn(network, wanted)

    def on_images_of_the_data(params, model_state, images, *, train):
      images = formats.convert(images, image_format, own_format)
      return apply_fn(params, model_state, images, train=train)

    return on_images_of_the_data

  return _SourceNetwork(
    make_apply_fn=make_apply_fn,
    variables=training.Source(*variables),
    image_format=own_format,
    num_classes=_num_outputs(layout),
    class_names=tuple(json.loads(metadata.get("class_names", "[]"))),
    select_taps=lambda: named(models.select_taps(layout, config.taps)),
    all_taps=named(layout.taps),
    no_taps=named(models.no_taps(layout)),
  )


def _num_outputs(layout):
  return (1, *layout.output_shape)[-1]  # [B, K], or [B].


def _source_format(config, metadata, image_format):
  """What the source wants: as configured, as recorded, or as the data are."""
  channels = int(metadata.get("channels", image_format.channels))
  recorded = lambda what: tuple(json.loads(metadata.get(what, "[]")))
  source = formats.ImageFormat(
    config.image_size or image_format.size,
    channels,
    tuple(config.mean) or recorded("mean") or image_format.mean,
    tuple(config.std) or recorded("std") or image_format.std,
  )
  for what, values in (("mean", source.mean), ("std", source.std)):
    if len(values) not in (1, channels):
      raise errors.InputError(
        f"{what} of the source {config.weights} is {values}, but it sees images"
        f" of {channels} channels; set its field {what} to"
        f" {' or '.join(map(str, sorted({1, channels})))} values"
      )
  return source


def _plan_transfer(config, method, networks, target_layout):
  """Choose the pairs, and what of their weights is learned."""
  frozen = None
  wanted = config.transfer.pairs or method.pair_set
  if config.transfer.map:
    frozen = transfer.TransferMap(
      *transfer_map.read_weights(config.transfer.map)
    )
    wanted = list(frozen.pair)
  if isinstance(wanted, list) or "->" in wanted:  # By hand, among all taps.
    target_taps = target_layout.taps
    source_taps = _merged(n.all_taps for n in networks.values())
    pairs = pair_sets.make_pairs(
      wanted,
      source_taps,
      target_taps,
      no_taps=(
        _merged(n.no_taps for n in networks.values()),
        models.no_taps(target_layout),
      ),
    )
  else:
    target_taps = models.select_taps(target_layout, config.target.taps)
    groups = [network.select_taps() for network in networks.values()]
    source_taps = _merged(groups)
    # The last tap is each source's own; resolutions compare over all sources.
    if wanted != "single":
      groups = [source_taps]
    pairs = tuple(
      pair
      for taps in groups
      for pair in pair_sets.make_pairs(wanted, taps, target_taps)
    )
  if frozen:
    _check_map(config, frozen, pairs, source_taps)
  used = lambda taps, names: {n: taps[n] for n in taps if n in names}
  learned = lambda value: value == "learned" and not frozen
  return _Plan(
    pairs,
    used(source_taps, {pair.source for pair in pairs}),
    used(target_taps, {pair.target for pair in pairs}),
    frozen,
    method.learn_channels and learned(config.transfer.channel_weights),
    method.learn_pairs and learned(config.transfer.pair_weights),
  )


def _merged(dicts):
  return {name: value for one in dicts for name, value in one.items()}


def _check_map(config, frozen, pairs, source_taps):
  for pair in pairs:
    given = len(frozen.channel[pair.name])
    expected = source_taps[pair.source][-1]
    if given != expected:
      raise errors.InputError(
        f"{config.transfer.map}: pair {pair.name} has {given} channel weights,"
        f" but the source tap has {expected} channels"
      )


def _weights_fn(config, plan):
  if plan.frozen:
    return lambda _, pooled: transfer.repeat_map(plan.frozen, pooled)
  return functools.partial(
    transfer.transfer_weights,
    pairs=plan.pairs,
    activation=config.transfer.pair_activation,
  )


def _auxiliary_losses(config, method, pairs, networks, head_tap, num_outputs):
  """Make the losses that the method adds to L_org; name -> loss."""
  makers = {
    "matching": lambda: objectives.matching(pairs, beta=config.transfer.beta),
    "attention": lambda: objectives.attention(pairs, beta=config.at.beta),
    "lwf": lambda: objectives.lwf(head_tap, **config.lwf),
    "kd": lambda: objectives.kd(**config.kd),
  }
  return {name: makers[name]() for name in method.losses}


def _check_same_classes(networks, num_outputs, class_names):
  """Make sure that outputs of sources can be compared with the target's."""
  numbers = tuple(str(number) for number in range(num_outputs))
  for name, network in networks.items():
    needs = (
      "method 'kd' needs the source's classes to be the target's: the"
      f" source{name and ' '}{name}"
    )
    if network.num_classes != num_outputs:
      raise errors.InputError(
        f"{needs} has {network.num_classes}, the data have {num_outputs}; use"
        " 'lwf'"
      )
    named = (network.class_names, class_names)
    if not all(names and names != numbers for names in named):
      continue
    for number, (theirs, ours) in enumerate(zip(*named, strict=False)):
      if theirs != ours:
        raise errors.InputError(
          f"{needs} has {theirs!r} as class {number}, the data have {ours!r};"
          " use 'lwf'"
        )


def _make_target(network, method, networks, image_format, batch_size):
  layout = models.trace(network, image_format.shape)
  head_tap, num_features = "", 0
  if "lwf" in method.losses:
    head_tap = models.last_tap(layout.taps)
    num_features = layout.taps[head_tap][-1]
  start, notes = lambda variables: variables, ()
  if method.starts_from_source:
    start, notes = _start_from_source(layout, networks, image_format)
  init = jax.jit(lambda key: models.init(network, key, image_format.shape))
  return _TargetNetwork(
    network,
    layout,
    init,
    start,
    head_tap,
    num_features,
    (*models.training_notes(network, layout, batch_size), *notes),
  )


def _start_from_source(layout, networks, image_format):
  """Return (fresh variables -> those that training starts from, notes)."""
  if len(networks) > 1:
    raise errors.InputError(
      "fine-tuning starts from one source, but config.sources has"
      f" {len(networks)}: {', '.join(networks)}"
    )
  (source,) = networks.values()
  params, model_state = source.variables
  others = {"params": params, **model_state}
  _, copied, fresh = weight_files.adopt(layout.variables, others)
  if len(copied) < len(fresh):
    raise errors.InputError(
      "fine-tuning needs a source of the target's architecture, but only"
      f" {len(copied)} of {len(copied) + len(fresh)} arrays of the target have"
      " a namesake of their shape in the source; use a transfer method"
    )
  notes = [f"{len(copied)} arrays start from the source"]
  if fresh:
    notes[0] += f", afresh: {', '.join(fresh)}"
  notes += [
    f"{what} of the images is {ours}, but the source was trained with {theirs};"
    f" fine-tuning is best with config.data.{what} of the source"
    for what in ("mean", "std")
    if (ours := getattr(image_format, what))
    != (theirs := getattr(source.image_format, what))
  ]
  return lambda variables: weight_files.adopt(variables, others)[0], tuple(
    notes
  )


def _initial_values(seed, method, plan, networks, target):
  """Return (params, model_state, meta_params)."""
  key = jax.random.fold_in(jax.random.key(seed), _INIT)
  target_key, regressor_key, meta_key, head_key = jax.random.split(key, 4)
  params, model_state = target.init(target_key)
  variables = dict(target.start({"params": params, **model_state}))
  params = {"target": variables.pop("params")}
  if "matching" in method.losses:
    params["regressors"] = transfer.init_regressors(
      regressor_key, plan.pairs, plan.source_taps, plan.target_taps
    )
  if "lwf" in method.losses:
    params["heads"] = objectives.init_heads(
      head_key,
      target.num_features,
      {name: network.num_classes for name, network in networks.items()},
    )
  meta_params = transfer.init_meta_params(
    meta_key,
    plan.pairs,
    plan.source_taps,
    learn_channels=plan.learn_channels,
    learn_pairs=plan.learn_pairs,
  )
  return params, variables, meta_params
