"""Turn an experiment into batches, losses, first states and programs.

`build` assembles everything that training needs, once, from plain objects;
`trainer` and `loop` only use the result.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import data, errors, fingerprints, models, types
from l2t_jax.data import image_formats
from l2t_jax.method import (
  attention_distillation,
  objectives,
  optimizers,
  pair_sets,
  training,
  transfer,
)
from l2t_jax.models import weight_files
from l2t_jax.run import experiments
from l2t_jax.run import sources as source_networks
from l2t_jax.runtime import compilation, phases, sharding

# The fastest mode, then the one that keeps least between forward and backward
# pass, which is used if the fastest does not fit into memory.
_AUTO_MODES = ("linearized", "mixed")
# Folded into the seed's PRNG key for initialisation, where data loading folds
# in the epoch: the two never share a key.
_INIT = 2**32 - 1


class Setup(NamedTuple):
  """Everything that training an experiment needs."""

  dataset: data.Dataset
  image_format: image_formats.ImageFormat  # What the target sees.
  num_outputs: int  # Size of the target's last axis.
  problem: training.Problem
  recipe: training.Recipe  # Its mode is the first of `modes`.
  # Learning rates and weights of losses, placed on the mesh.
  scalars: experiments.Scalars
  # Scalars, which may be traced -> the problem and the recipe with them.
  assemble: Callable[
    [experiments.Scalars], tuple[training.Problem, training.Recipe]
  ]
  # How to differentiate through the look-ahead; the first that fits is used.
  modes: tuple[str, ...]
  # The sources that the losses read, placed on the mesh.
  sources: dict[str, training.Variables]
  source_taps: pair_sets.TapShapes  # The source taps that pairs use.
  update_every: int  # Iterations per meta update; 0 if there is none.
  create_state: Callable[[int], types.TrainState]  # seed -> first state.
  # (model_state, seed) -> model_state with other PRNG keys.
  fold_in: Callable[[types.PyTree, int], types.PyTree]
  state_shapes: types.TrainState  # `jax.ShapeDtypeStruct`s, with shardings.
  # Zeros in the shapes of this process's rows.
  blank_batch: types.Batch
  blank_eval_batch: types.EvalBatch
  eval_step: Any  # `training.make_eval_step`.
  mesh: jax.sharding.Mesh
  inputs: dict[str, str]  # Name -> fingerprint of what training reads.
  notes: tuple[str, ...]  # What the user should be told, one line each.

  @property
  def looks_ahead(self) -> bool:
    """True if a look-ahead is differentiated."""
    return self.update_every > 0 and self.recipe.look_ahead_loss != "none"


class _Target(NamedTuple):
  """The network to be trained, with what tracing found."""

  network: models.Network
  layout: models.Layout
  # PRNG key -> the (params, model_state) that training starts from.
  init: Callable[[Any], tuple[types.PyTree, types.PyTree]]
  head_tap: str  # The tap that the heads of LwF read; "" without LwF.
  notes: tuple[str, ...]  # What the user should know about its training.


class _Matching(NamedTuple):
  """Which features are compared."""

  pairs: tuple[pair_sets.Pair, ...] = ()
  attention_pairs: tuple[pair_sets.Pair, ...] = ()  # Of attention transfer.
  source_taps: pair_sets.TapShapes = {}  # noqa: RUF012
  target_taps: pair_sets.TapShapes = {}  # noqa: RUF012


@phases.phase("tracing")
@compilation.garbage_collection_paused()
def build(experiment: experiments.Experiment) -> Setup:
  """Split and read images, trace networks and put losses together.

  Args:
    experiment: what is to be trained.

  Raises:
    errors.InputError: for data, weights or values that cannot work together.
  """
  settings, method = experiment.settings, experiment.method
  _check_task(experiment)
  method.check_sources(experiment.sources)
  mesh = sharding.make_mesh()
  _check_devices(experiment, mesh)
  dataset = _load_data(experiment)
  image_format = image_formats.ImageFormat(
    dataset.image_shape[0],
    dataset.image_shape[-1],
    dataset.mean,
    dataset.std,
  )
  sources = source_networks.trace(experiment, image_format)
  source_networks.check_values(experiment, dataset.values)
  source_networks.check_bit_depth(experiment, dataset)
  target = _make_target(experiment, sources, image_format)
  _check_outputs(experiment, dataset, sources, target.layout)
  if "kd" in method.losses and experiment.task is objectives.CLASSIFICATION:
    sources = [
      source_networks.in_class_order(source, dataset.class_names)
      for source in sources
    ]
  plan = _Matching()
  if method.pair_set is not None:
    plan = _plan_matching(experiment, sources, target.layout)
  read = sources if method.losses else []
  modes: tuple[str, ...] = (settings.bilevel.mode,)
  if modes == ("auto",):
    # Without a look-ahead, the program is the same in all modes.
    modes = _AUTO_MODES if experiment.looks_ahead else _AUTO_MODES[:1]
  target_fn = models.as_apply_fn(
    target.network,
    {*plan.target_taps, target.head_tap} - {""},
    experiment.batch_norm_groups,
  )
  source_fns = {
    source.name: source.make_apply_fn(plan.source_taps, image_format)
    for source in read
  }
  weights_fn = _make_weights_fn(experiment, plan.pairs)

  def assemble(scalars):
    chosen = settings.with_scalars(scalars)
    losses = _make_losses(
      experiment._replace(settings=chosen), target_fn, plan, target.head_tap
    )
    return (
      training.Problem(
        losses, source_fns, plan.pairs, plan.target_taps, weights_fn
      ),
      _make_recipe(chosen, dataset.steps_per_epoch, modes[0]),
    )

  problem, recipe = assemble(settings.scalars)
  first_state = _make_first_state(experiment, plan, sources, target, recipe)
  create_state, shapes = _place_states(settings, first_state, mesh)
  if ":" in settings.optimizer.name:
    optimizers.check(recipe.optimizer_fn, shapes.inner.params)
  place = lambda tree: jax.device_put(tree, _shardings(settings, mesh)(tree))
  notes = [
    *source_networks.notes(experiment, sources, plan.pairs),
    *target.notes,
    *dataset.notes,
  ]
  if "kd" in method.losses and all(map(str.isdecimal, dataset.class_names)):
    notes.append(
      "kd takes equal numbers of the source's classes and of the data's for the"
      " same class, because they have no other names"
    )
  if experiment.has_outer:
    notes.append(
      "the outer loss reads validation images: their accuracy is optimistic"
    )
  return Setup(
    dataset=dataset,
    image_format=image_format,
    num_outputs=target.layout.num_outputs,
    problem=problem,
    recipe=recipe,
    scalars=jax.device_put(
      jax.tree.map(lambda x: jnp.asarray(x, float), settings.scalars),
      sharding.replicated(mesh),
    ),
    assemble=assemble,
    modes=modes,
    sources={
      source.name: place(
        source.with_scales(plan.source_taps)
        if settings.transfer.feature_scale == "std"
        else source.variables
      )
      for source in read
    },
    source_taps=plan.source_taps,
    update_every=settings.meta.update_every if any(experiment.learns) else 0,
    create_state=create_state,
    fold_in=jax.jit(functools.partial(models.fold_in, target.network)),
    state_shapes=shapes,
    blank_batch=_blank_batch(experiment, dataset),
    blank_eval_batch=types.EvalBatch(
      *_blank_rows(dataset, dataset.num_eval_rows),
      np.zeros(dataset.num_eval_rows, np.float32),
    ),
    eval_step=training.make_eval_step(target_fn, experiment.task),
    mesh=mesh,
    inputs=_fingerprints(dataset, sources, experiment.frozen),
    notes=tuple(notes),
  )


def jit_step(
  setup: Setup,
  state: types.TrainState,
  *,
  mode: str,
  num_seeds: int = 1,
  update_meta: bool = True,
) -> jax.stages.Wrapped:
  """Return the jitted iteration.

  It maps (state, scalars, sources, batch) to (state, metrics).

  Args:
    setup: from `build`.
    state: of one seed, or of several along a leading axis; or its shapes with
      shardings. The state that the iteration is called with is donated.
    mode: how the hypergradient is computed.
    num_seeds: how many seeds train together.
    update_meta: whether the iteration has a meta update.
  """

  def step(state, scalars, sources, batch):
    problem, recipe = setup.assemble(scalars)
    train_step = training.make_train_step(
      problem, recipe._replace(mode=mode), update_meta=update_meta
    )
    return train_step(state, sources, batch)

  if num_seeds > 1:
    step = jax.vmap(step, in_axes=(0, None, None, 0))
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda leaf: leaf.sharding, state),
      sharding.replicated(setup.mesh),
    ),
  )


def _check_task(experiment):
  """Reject options that only classification has."""
  if experiment.task is objectives.CLASSIFICATION:
    return
  for field, value in (
    ("target.label_smoothing", experiment.label_smoothing),
    ("data.mixup", experiment.reading.mixup),
    ("data.cutmix", experiment.reading.cutmix),
  ):
    if value:
      raise errors.InputError(
        f"config.{field} is {value}, but the task is not classification; set it"
        " to 0"
      )


def _check_devices(experiment, mesh):
  for field, value in (
    ("batch_size", experiment.settings.batch_size),
    ("data.unlabeled_batch_size", experiment.reading.unlabeled_batch_size),
  ):
    if value % mesh.size:
      raise errors.InputError(
        f"config.{field} is {value}; it must be a multiple of the number of"
        f" devices, {mesh.size}"
      )


@phases.phase("data")
def _load_data(experiment):
  dataset = data.load(
    experiment.reading,
    batch_size=experiment.settings.batch_size,
    seed=experiment.settings.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    images=experiment.images,
    has_outer=experiment.has_outer,
  )
  if not dataset.num_val:
    raise errors.InputError(
      "there are no validation images to choose the best epoch by; set"
      " config.data.val_fraction above 0"
    )
  return dataset


def _blank_batch(experiment, dataset):
  rows = lambda size: size // jax.process_count()
  batch_size = experiment.settings.batch_size
  unlabeled = None
  if dataset.num_unlabeled:
    unlabeled, _ = _blank_rows(
      dataset, rows(experiment.reading.unlabeled_batch_size or batch_size)
    )
  mixing = None
  if dataset.mixes:
    mixing = types.Mixing(
      np.ones(rows(batch_size), np.float32),
      np.zeros((rows(batch_size), 4), np.int32),
    )
  labelled = types.Labelled(*_blank_rows(dataset, rows(batch_size)))
  return types.Batch(
    *labelled, unlabeled, mixing, labelled if experiment.has_outer else None
  )


def _blank_rows(dataset: data.Dataset, count: int) -> tuple[Any, Any]:
  """Return images and labels."""
  return (
    np.zeros((count, *dataset.image_shape), np.float32),
    np.zeros((count, *dataset.label_shape), dataset.label_dtype),
  )


def _check_outputs(experiment, dataset, sources, layout):
  if experiment.task is objectives.CLASSIFICATION:
    _check_classification(dataset, layout.output_shape)
  for source in sources:
    if {"kd", "lwf"} & {*experiment.method.losses} and not source.num_classes:
      raise errors.InputError(
        f"method {experiment.settings.method!r} needs the source's logits, but"
        f" the {source.label} has no classifier; use a method that matches"
        " features"
      )
    if "kd" in experiment.method.losses and (
      source.num_classes != layout.num_outputs
    ):
      raise errors.InputError(
        f"method 'kd' needs as many logits of the {source.label},"
        f" {source.num_classes}, as of the target, {layout.num_outputs}; use"
        " 'lwf'"
      )


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


def _plan_matching(experiment, sources, target_layout):
  """Choose the pairs of taps that are compared."""
  method, fields = experiment.method, experiment.settings.transfer
  frozen = experiment.frozen
  wanted = fields.pairs or method.pair_set
  if frozen:
    wanted = list(frozen.pair)
  # Listed pairs may use any tap, not only the selected ones.
  if isinstance(wanted, list) or "->" in wanted:
    target_taps = target_layout.taps
    source_taps = _merged(s.named(s.layout.taps) for s in sources)
    pairs = pair_sets.make_pairs(
      wanted,
      source_taps,
      target_taps,
      untappable=(
        _merged(s.named(s.layout.untappable) for s in sources),
        target_layout.untappable,
      ),
    )
  else:
    target_taps = models.select_taps(target_layout, experiment.target_taps)
    groups = [
      s.named(models.select_taps(s.layout, s.patterns)) for s in sources
    ]
    source_taps = _merged(groups)
    # "single" pairs the last tap of each source; the other sets compare
    # resolutions over all sources.
    if wanted != "single":
      groups = [source_taps]
    pairs = tuple(
      pair
      for taps in groups
      for pair in pair_sets.make_pairs(wanted, taps, target_taps)
    )
  if frozen:
    _check_frozen(fields.map, frozen, pairs, source_taps)
  used = lambda taps, names: {n: taps[n] for n in taps if n in names}
  return _Matching(
    pairs,
    _attention_pairs(method, pairs, source_taps, target_taps),
    used(source_taps, {pair.source for pair in pairs}),
    used(target_taps, {pair.target for pair in pairs}),
  )


def _attention_pairs(method, pairs, source_taps, target_taps):
  """Return the pairs of attention transfer.

  In a combination, these are the method's pairs of equal resolution.
  """
  if "attention" not in method.added:
    return pairs
  equal = pair_sets.of_equal_size(pairs, source_taps, target_taps)
  if not equal:
    raise errors.InputError(
      "attention transfer compares pairs of equal resolution, but none of"
      f" {', '.join(pair.name for pair in pairs)} has it; leave out at, or"
      " choose other pairs in config.transfer.pairs"
    )
  return equal


def _merged(dicts):
  return {name: value for one in dicts for name, value in one.items()}


def _check_frozen(file, frozen, pairs, source_taps):
  for pair in pairs:
    given = len(frozen.channel[pair.name])
    expected = source_taps[pair.source][-1]
    if given != expected:
      raise errors.InputError(
        f"{file}: pair {pair.name} has {given} channel weights, but the source"
        f" tap has {expected} channels"
      )


def _make_weights_fn(experiment, pairs):
  """Return the function (meta_params, pooled features) -> (w, λ), or None."""
  if "matching" not in experiment.method.losses:
    return None
  if experiment.frozen:
    return lambda _, pooled: transfer.repeat_map(experiment.frozen, pooled)
  return functools.partial(
    transfer.transfer_weights,
    pairs=pairs,
    activation=experiment.pair_activation,
  )


def _make_losses(experiment, target_fn, plan, head_tap):
  settings = experiment.settings
  matching = {"transfer": {"beta": settings.transfer.beta}}
  method = experiment.method
  auxiliary = objectives.make_auxiliary_losses(
    method,
    pairs=plan.pairs,
    attention_pairs=plan.attention_pairs,
    head_tap=head_tap,
    hyperparameters={**settings.losses, **matching},
  )
  task = objectives.smoothed(experiment.task, experiment.label_smoothing)
  return objectives.make_losses(target_fn, auxiliary, task, added=method.added)


def _make_recipe(settings, steps_per_epoch, mode):
  inner, meta, bilevel = settings.optimizer, settings.meta, settings.bilevel
  looks_ahead = objectives.get_method(settings.method).looks_ahead
  warmup_steps = inner.warmup_steps or round(
    inner.warmup_epochs * steps_per_epoch
  )
  if warmup_steps >= settings.epochs * steps_per_epoch:
    raise errors.InputError(
      f"the warm-up of the learning rate has {warmup_steps} iterations, but the"
      f" run has only {settings.epochs * steps_per_epoch}; lower"
      " config.optimizer.warmup_steps or warmup_epochs"
    )
  return training.Recipe(
    optimizers.make(
      inner.name,
      momentum=inner.momentum,
      b2=inner.b2,
      weight_decay=inner.weight_decay,
      decayed=inner.decayed,
      clip_norm=inner.clip_norm,
    ),
    optimizers.make_schedule(
      inner.schedule,
      inner.learning_rate,
      epochs=settings.epochs,
      steps_per_epoch=steps_per_epoch,
      warmup_steps=warmup_steps,
    ),
    optimizers.adam_l2(meta.learning_rate, meta.weight_decay, meta.clip_norm),
    bilevel.num_inner_steps,
    bilevel.look_ahead_loss if looks_ahead else "none",
    mode,
    bilevel.loop == "scan",
    settings.bad_numbers == "skip",
    inner.ema_decay,
  )


def _make_target(experiment, sources, image_format):
  network, method = experiment.target, experiment.method
  layout = models.trace(network, image_format.shape)
  notes: tuple[str, ...] = ()
  if method.trains != "target":
    if len(layout.output_shape) != 1:
      raise errors.InputError(
        f"method {experiment.settings.method!r} has outputs ['B', K], but those"
        f" of the task are {['B', *layout.output_shape]}; use another method"
      )
    (source,) = sources
    network = source_networks.as_target(
      source, layout.num_outputs, image_format, trains=method.trains
    )
    layout = models.trace(network, image_format.shape)
    read = models.last_tap(source.layout.taps)
    notes = (f"the classifier reads the source's tap {read!r}",)
  fresh = compilation.jit_random(
    lambda key: models.init(network, key, image_format.shape)
  )
  others: types.PyTree = {}
  if method.starts_from_source:
    others, notes = _source_to_start_from(layout, sources, image_format)

  def init(key):
    params, model_state = fresh(key)
    if others:
      model_state, *_ = weight_files.copy_matching(
        {"params": params, **model_state}, others
      )
      params = model_state.pop("params")
    if others or method.trains != "target":
      # The source's PRNG keys are the same for all seeds.
      number = jax.random.bits(key, dtype=jnp.uint32)
      model_state = models.fold_in(network, model_state, number)
    return params, model_state

  return _Target(
    network,
    layout,
    init,
    models.last_tap(layout.taps) if "lwf" in method.losses else "",
    (
      *models.training_notes(network, layout, experiment.settings.batch_size),
      *notes,
    ),
  )


def _source_to_start_from(layout, sources, image_format):
  """Return (the source's variables, notes) for fine-tuning."""
  (source,) = sources
  if source.bands and source.bands != tuple(range(image_format.channels)):
    raise errors.InputError(
      f"fine-tuning starts from weights for the bands {source.bands}, but the"
      f" target sees the channels 0 to {image_format.channels - 1}; order those"
      " of the images like that, or use a transfer method"
    )
  params, model_state = source.variables
  others = {"params": params, **model_state}
  _, copied, fresh = weight_files.copy_matching(layout.variables, others)
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
  return others, tuple(notes)


def _make_first_state(experiment, plan, sources, target, recipe):
  """Return seed -> the state before the first iteration."""
  losses = experiment.method.losses
  learn_channels, learn_pairs = experiment.learns
  add_optimizers = jax.jit(
    functools.partial(training.create_state, recipe=recipe)
  )

  def first_state(seed):
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    target_key, regressor_key, meta_key, head_key = jax.random.split(key, 4)
    attention_key = jax.random.fold_in(key, 4)
    target_params, model_state = target.init(target_key)
    params = {"target": target_params}
    if "matching" in losses:
      params["regressors"] = transfer.init_regressors(
        regressor_key, plan.pairs, plan.source_taps, plan.target_taps
      )
    if "lwf" in losses:
      params["heads"] = objectives.init_heads(
        head_key,
        target.layout.taps[target.head_tap][-1],
        {source.name: source.num_classes for source in sources},
      )
    if "afd" in losses:
      params["afd"] = attention_distillation.init(
        attention_key,
        plan.pairs,
        plan.source_taps,
        plan.target_taps,
        dim=experiment.settings.losses["afd"]["dim"],
      )
    if "aft" in losses:
      params["aft"] = objectives.init_channel_scales(
        plan.pairs, plan.source_taps
      )
    meta_params = transfer.init_meta_params(
      meta_key,
      plan.pairs,
      plan.source_taps,
      learn_channels=learn_channels,
      learn_pairs=learn_pairs,
    )
    return add_optimizers(params, model_state, meta_params)

  return first_state


def _shardings(settings, mesh):
  """Return tree -> the sharding of each of its arrays."""
  choose = sharding.split if settings.shard_params else sharding.replicate
  return functools.partial(choose, mesh=mesh)


def _place_states(settings, first_state, mesh):
  """Return (seed -> first state on the mesh, its shapes with shardings)."""
  shardings = _shardings(settings, mesh)
  # The whole state may not fit on one device, so it is made in host memory.
  making = sharding.on_host if settings.shard_params else contextlib.nullcontext

  @phases.phase("initialisation")
  @compilation.garbage_collection_paused()
  def create_state(seed):
    with making():
      state = first_state(seed)
    return jax.device_put(state, shardings(state))

  shapes = jax.eval_shape(functools.partial(first_state, settings.seed))
  return create_state, sharding.with_shardings(shapes, shardings(shapes))


def _fingerprints(dataset, sources, frozen):
  """Return name -> fingerprint of the inputs of training."""
  inputs = {"the images and labels": dataset.fingerprint}
  if frozen:
    inputs["the transfer map"] = fingerprints.fingerprint(frozen)
  return inputs | {
    f"the {source.label}": fingerprints.fingerprint(
      (
        jax.device_get(source.variables),
        source.image_format,
        source.class_order,
        getattr(source.network, "digest", ""),
      )
    )
    for source in sources
  }
