"""From a config to a trained network: glues data, models and iterations.

This is the one module that knows configs; everything below takes plain values.
"""

from __future__ import annotations

from collections.abc import Mapping
import functools
import json
import math
import os
import pathlib
import platform
import time
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import jaxlib
import ml_collections
import numpy as np
import optax

from l2t_jax import (
  bilevel,
  checkpoint,
  data,
  logs,
  models,
  objectives,
  pretrained,
  report,
  sharding,
  training,
  transfer,
  types,
)

# config.precision -> (dtype of the activations, precision of products).
_PRECISIONS = {
  "f32": (None, "float32"),
  "tf32": (None, "tensorfloat32"),
  "bf16": (jnp.bfloat16, "default"),
}
_VERSIONED = (jax, jaxlib, flax, optax, np)
# Folded into the seed's key for initialisation; the data fold in epochs.
_INIT = 2**32 - 1
_LOOPS = ("auto", "scan", "unroll")
# Fields that may differ between a run and its resumption.
_FREE_FIELDS = ("log_every", "checkpoint_every", "data.num_workers")


class Run(NamedTuple):
  """All that the loop needs, made from a config."""

  dataset: data.Dataset
  source: training.Source | None
  source_taps: transfer.TapShapes
  target_taps: transfer.TapShapes
  pairs: tuple[transfer.Pair, ...]
  train_step: Any  # Jitted `training.make_train_step`.
  eval_step: Any  # Jitted `training.make_eval_step`.
  learning_rate_fn: Any  # iteration -> learning rate.
  mesh: jax.sharding.Mesh


def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Train one experiment, resuming where an earlier call was cut off.

  Args:
    config: the fields of configs/default.py.
    workdir: folder of the run. Gets config.json, metrics.jsonl, tensorboard/,
      checkpoints/, target.safetensors (the target at its best validation
      epoch), summary.json, and where something was transferred
      transfer_map.json and transfer_map.png.

  Returns:
    The content of summary.json.

  Raises:
    types.InputError: for a config, data or weights that cannot work, and where
      workdir holds a run of another config.
  """
  check(config)
  workdir = pathlib.Path(workdir)
  _check_workdir(workdir, config)
  summary_file = workdir / "summary.json"
  if summary_file.exists():
    print(f"{workdir} holds a complete run; nothing to do")
    return json.loads(summary_file.read_text())
  with jax.default_matmul_precision(_PRECISIONS[config.precision][1]):
    run, state = build(config)
    _write_json(workdir / "config.json", json.loads(config.to_json()))
    progress = _train(run, state, config, workdir)
  if run.pairs:
    _write_transfer_map(run, config, workdir, progress)
  summary = _summary(run, config, progress)
  _write_json(summary_file, summary)
  return summary


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse values that no run can have; see configs/default.py.

  Raises:
    types.InputError: naming the field, its value and what would be right.
  """
  positive = lambda value: value > 0
  share = lambda value: 0 <= value < 1
  not_negative = lambda value: value >= 0
  rules = (
    ("epochs", positive, "at least 1"),
    ("batch_size", positive, "at least 1"),
    ("log_every", positive, "at least 1"),
    ("checkpoint_every", positive, "at least 1"),
    ("seed", not_negative, "0 or more"),
    ("bilevel.num_inner_steps", positive, "at least 1"),
    ("transfer.beta", positive, "more than 0"),
    ("optimizer.learning_rate", positive, "more than 0"),
    ("optimizer.momentum", share, "at least 0 and less than 1"),
    ("optimizer.weight_decay", not_negative, "0 or more"),
    ("meta.learning_rate", positive, "more than 0"),
    ("meta.weight_decay", not_negative, "0 or more"),
  )
  for field, holds, right in rules:
    value = _get(config, field)
    if not holds(value):
      raise types.InputError(f"config.{field} is {value}; it must be {right}")
  for field, choices in (
    ("method", objectives.METHODS),
    ("precision", _PRECISIONS),
    ("target.model", models.MODELS),
    ("bilevel.mode", bilevel.MODES),
    ("bilevel.loop", _LOOPS),
  ):
    if _get(config, field) not in choices:
      raise types.InputError(
        f"config.{field} is {_get(config, field)!r}; it must be one of"
        f" {', '.join(choices)}"
      )
  if objectives.METHODS[config.method].pair_set and not config.source.weights:
    raise types.InputError(
      f"method {config.method!r} needs config.source.weights: a file made by"
      " python -m l2t_jax.pretrained, or target.safetensors of another run"
    )


def build(config: ml_collections.ConfigDict) -> tuple[Run, types.TrainState]:
  """Load data and source, initialise the target, jit the steps."""
  method = objectives.get_method(config.method)
  mesh = sharding.make_mesh()
  if config.batch_size % mesh.size:
    raise types.InputError(
      f"config.batch_size is {config.batch_size}; it must be a multiple of the"
      f" number of devices, {mesh.size}"
    )
  dataset = _load_data(config)
  if not dataset.num_val:
    raise types.InputError(
      "there are no validation images to choose the best epoch by; set"
      " config.data.val_fraction above 0"
    )
  dtype = _PRECISIONS[config.precision][0]
  target = models.create(config.target.model, dataset.num_classes, dtype)
  source_module, source = None, None
  pairs: tuple[transfer.Pair, ...] = ()
  source_taps, target_taps = {}, {}
  if method.pair_set:
    source_module, *variables = pretrained.load_network(
      pathlib.Path(config.source.weights), dataset.image_shape, dtype
    )
    source = sharding.replicate(training.Source(*variables), mesh)
    pairs, source_taps, target_taps = _choose_pairs(
      config, method, source_module, target, dataset.image_shape
    )
  optimizer_fn = training.sgd(
    momentum=config.optimizer.momentum,
    weight_decay=config.optimizer.weight_decay,
  )
  meta_optimizer = training.adam_l2(
    config.meta.learning_rate, config.meta.weight_decay
  )
  learning_rate_fn = training.cosine_by_epoch(
    config.optimizer.learning_rate,
    epochs=config.epochs,
    steps_per_epoch=dataset.steps_per_epoch,
  )
  init_key = jax.random.fold_in(jax.random.key(config.seed), _INIT)
  target_key, transfer_key = jax.random.split(init_key)
  state = training.create_state(
    transfer_key,
    models.init(target, target_key, dataset.image_shape),
    method=method,
    pairs=pairs,
    source_taps=source_taps,
    target_taps=target_taps,
    optimizer_fn=optimizer_fn,
    meta_optimizer=meta_optimizer,
  )
  rolled = config.bilevel.loop == "scan" or (
    config.bilevel.loop == "auto" and jax.default_backend() != "cpu"
  )
  target_fn = models.as_apply_fn(target)
  train_step = training.make_train_step(
    target_fn,
    models.as_apply_fn(source_module) if source_module else None,
    pairs=pairs,
    target_taps=target_taps,
    beta=config.transfer.beta,
    num_inner_steps=config.bilevel.num_inner_steps,
    learning_rate_fn=learning_rate_fn,
    optimizer_fn=optimizer_fn,
    meta_optimizer=meta_optimizer,
    mode=config.bilevel.mode,
    rolled=rolled,
  )
  run = Run(
    dataset=dataset,
    source=source,
    source_taps=source_taps,
    target_taps=target_taps,
    pairs=pairs,
    train_step=jax.jit(
      train_step, donate_argnums=0, out_shardings=sharding.replicated(mesh)
    ),
    eval_step=jax.jit(training.make_eval_step(target_fn)),
    learning_rate_fn=learning_rate_fn,
    mesh=mesh,
  )
  return run, sharding.replicate(state, mesh)


def evaluate(run: Run, inner: types.InnerState, split: str) -> dict[str, float]:
  """Evaluate on all of "val" or "test"; return {"loss", "accuracy"}."""
  totals = [
    run.eval_step(inner, sharding.shard(batch, run.mesh))
    for batch in run.dataset.eval_batches(split)
  ]
  total = lambda *parts: float(np.sum(parts))
  sums = jax.tree.map(total, *jax.device_get(totals))
  return {
    "loss": sums["loss"] / sums["count"],
    "accuracy": sums["correct"] / sums["count"],
  }


def _choose_pairs(config, method, source_module, target, image_shape):
  """Return the pairs and the taps of source and target that they use."""
  if "->" in config.transfer.pairs:  # Listed by hand, among all taps.
    source_taps = models.tap_shapes(source_module, image_shape)
    target_taps = models.tap_shapes(target, image_shape)
  else:
    source_taps = models.select_taps(
      source_module, image_shape, config.source.taps
    )
    target_taps = models.select_taps(target, image_shape, config.target.taps)
  pairs = transfer.make_pairs(
    config.transfer.pairs or method.pair_set, source_taps, target_taps
  )
  used = lambda taps, names: {n: taps[n] for n in taps if n in names}
  return (
    pairs,
    used(source_taps, {pair.source for pair in pairs}),
    used(target_taps, {pair.target for pair in pairs}),
  )


def _load_data(config):
  fields = config.data.to_dict()
  return data.load(
    fields.pop("source"),
    **fields,
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def _train(run, state, config, workdir):
  """Run the epochs that are left; return what the last one remembers."""
  dataset = run.dataset
  progress: dict[str, Any] = {"epoch": 0, "seconds": 0.0, "val_accuracy": -1.0}
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    restored = checkpoints.restore(like=state)
    if restored:
      state, progress = restored
    step = progress["epoch"] * dataset.steps_per_epoch
    metrics_log = logs.MetricsLog(workdir, from_step=step)
    display = logs.Progress(
      config.epochs * dataset.steps_per_epoch, step, config.batch_size
    )
    display.say(_headline(run, state, config))
    if restored:
      display.say(f"resuming after epoch {progress['epoch']}")
    try:
      for epoch in range(progress["epoch"] + 1, config.epochs + 1):
        start = time.time()
        state, record = _train_epoch(
          run, state, epoch, config.log_every, metrics_log, display
        )
        validation = evaluate(run, state.inner, "val")
        record |= {f"val_{name}": v for name, v in validation.items()}
        progress |= {
          "epoch": epoch,
          "channel_weights": record.pop("channel_weights", None),
        }
        if validation["accuracy"] > progress["val_accuracy"]:
          test = evaluate(run, state.inner, "test")
          record["test_accuracy"] = test["accuracy"]
          progress |= {
            "best_epoch": epoch,
            "val_accuracy": validation["accuracy"],
            "test_accuracy": test["accuracy"],
          }
          _save_target(run, config, state.inner, workdir, progress)
        step += dataset.steps_per_epoch
        progress["seconds"] += time.time() - start
        metrics_log.write("epoch", step, record)
        display.say(_epoch_line(record, config.epochs))
        if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
          checkpoints.save(step, state, progress)
    finally:
      display.close()
      metrics_log.close()
  return progress


def _train_epoch(run, state, epoch, log_every, metrics_log, display):
  """Train one epoch; return (state, record of its means)."""
  last_step = epoch * run.dataset.steps_per_epoch
  step = last_step - run.dataset.steps_per_epoch
  learning_rate = float(run.learning_rate_fn(step))
  pending, fetched = [], []
  for batch in run.dataset.train_batches(epoch - 1):
    state, metrics = run.train_step(
      state, run.source, sharding.shard(batch, run.mesh)
    )
    pending.append(metrics)
    step += 1
    if step % log_every == 0 or step == last_step:
      pending = jax.device_get(pending)
      scalars = _scalars(_mean(pending))
      _check_finite(scalars, step)
      metrics_log.write("train", step, {"epoch": epoch, **scalars})
      display.update(epoch, len(pending), scalars)
      fetched += pending
      pending = []
  means = _mean(fetched)
  record: dict[str, Any] = {"epoch": epoch, "learning_rate": learning_rate}
  record |= {f"train_{name}": v for name, v in _scalars(means).items()}
  if run.pairs:
    names = [pair.name for pair in run.pairs]
    by_pair = lambda values: dict(zip(names, values.tolist(), strict=True))
    record |= {
      "pair_weights": by_pair(means["transfer"]["pair_weights"]),
      "matching_distances": by_pair(means["transfer"]["distances"]),
      "channel_weights": {
        name: weights.tolist()
        for name, weights in means["transfer"]["channel_weights"].items()
      },
    }
  return state, record


def _check_finite(scalars, step):
  for name, value in scalars.items():
    if not math.isfinite(value):
      raise types.InputError(
        f"{name} is {value} within the iterations up to {step}; lower"
        " config.optimizer.learning_rate, config.transfer.beta or"
        " config.meta.learning_rate"
      )


def _mean(metrics):
  return jax.tree.map(lambda *values: np.mean(values, axis=0), *metrics)


def _scalars(metrics):
  return {k: float(v) for k, v in metrics.items() if k != "transfer"}


def _save_target(run, config, inner, workdir, progress):
  pretrained.save(
    workdir / "target.safetensors",
    jax.device_get({"params": inner.params["target"], **inner.model_state}),
    {
      "model": config.target.model,
      "num_classes": str(run.dataset.num_classes),
      "class_names": json.dumps(list(run.dataset.class_names)),
      "config": config.to_json(),
      "epoch": str(progress["epoch"]),
      "val_accuracy": str(progress["val_accuracy"]),
    },
  )


def _write_transfer_map(run, config, workdir, progress):
  epochs = [r for r in report.read_metrics(workdir) if r["kind"] == "epoch"]
  report.write_transfer_map(
    workdir,
    report.transfer_map(
      epochs,
      {k: np.array(v) for k, v in progress["channel_weights"].items()},
      list(run.source_taps.items()),
      list(run.target_taps.items()),
      config.method,
    ),
  )


def _summary(run, config, progress):
  dataset = run.dataset
  return {
    "method": config.method,
    "seed": config.seed,
    "val_accuracy": progress["val_accuracy"],
    "test_accuracy": progress["test_accuracy"],
    "best_epoch": progress["best_epoch"],
    "epochs": config.epochs,
    "seconds": round(progress["seconds"], 1),
    "split_hash": dataset.split_hash,
    "num_train": dataset.num_train,
    "num_val": dataset.num_val,
    "num_test": dataset.num_test,
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "versions": {
      "python": platform.python_version(),
      **{module.__name__: module.__version__ for module in _VERSIONED},
    },
  }


def _headline(run, state, config):
  """Say what is about to be trained on what."""
  dataset = run.dataset
  params = state.inner.params["target"]
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  lines = [
    f"{config.method}: {config.target.model}, {count:,} parameters, on"
    f" {dataset.num_train} training, {dataset.num_val} validation and"
    f" {dataset.num_test} test images of {dataset.num_classes} classes"
    f" (split {dataset.split_hash})"
  ]
  if run.pairs:
    lines.append(f"{len(run.pairs)} pairs from {config.source.weights}")
  return "\n".join(lines)


def _epoch_line(record, epochs):
  line = (
    f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4f}"
    f"  val {record['val_accuracy']:.2%}"
  )
  if "test_accuracy" in record:
    line += f"  (best so far; test {record['test_accuracy']:.2%})"
  return line


def _check_workdir(workdir, config):
  """Create the folder, or make sure that it holds a run of this config."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise types.InputError(
      f"cannot use --workdir={workdir}: {error.strerror}; give a folder that"
      " can be written"
    ) from error
  config_file = workdir / "config.json"
  if config_file.exists():
    old = _flatten(json.loads(config_file.read_text()))
    differences = [
      f"{field} was {old.get(field)!r}, is {value!r}"
      for field, value in _flatten(json.loads(config.to_json())).items()
      if old.get(field) != value and field not in _FREE_FIELDS
    ]
    if differences:
      raise types.InputError(
        f"{workdir} holds a run of another config: {'; '.join(differences)};"
        " use another --workdir"
      )


def _write_json(path, content):
  partial = path.with_suffix(".partial")
  partial.write_text(json.dumps(content, indent=2) + "\n")
  partial.replace(path)


def _flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nested, sep=".")


def _get(config, field):
  return functools.reduce(getattr, field.split("."), config)
