"""The auxiliary losses against values computed by hand."""

import re

import chex
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import errors, types
from l2t_jax.method import (
  attention_distillation,
  loss_functions,
  objectives,
  pair_sets,
  training,
  transfer,
)


def logits_of(probabilities, temperature=1.0):
  """Return logits whose softmax at a temperature is given."""
  return temperature * jnp.log(jnp.array(probabilities))


def test_the_methods_of_the_paper_and_others():
  assert set(objectives.METHODS) == {
    "scratch", "lwf", "at", "lwf_at", "fm_single", "fm_one_to_one",
    "fm_all_to_all", "l2t_w_single", "l2t_w_one_to_one", "l2t_ww",
    "finetune", "linear_probe", "finetune_source", "kd", "aft", "afd",
    "fm_search", "l2t_ww_joint",
  }  # fmt: skip


def test_unknown_method():
  with pytest.raises(errors.InputError, match="'l2t'; the methods are scratch"):
    objectives.get_method("l2t")


def test_combinations():
  method = objectives.get_method("kd+l2t_ww")
  assert method == objectives.METHODS["l2t_ww"]._replace(
    losses=("matching", "kd"), added=("kd",)
  )
  assert objectives.get_method("l2t_ww+kd") == method
  method = objectives.get_method("fm_one_to_one+lwf+at")
  assert method.losses == ("matching", "attention", "lwf")
  assert method.pair_set == "one_to_one"


@pytest.mark.parametrize(
  "name",
  ["kd+lwf", "fm_single+l2t_ww", "kd+kd+l2t_ww", "afd+l2t_ww", "finetune+kd"],
)
def test_what_is_no_combination(name):
  with pytest.raises(
    errors.InputError, match=re.escape(f"{name!r} is not a comb")
  ):
    objectives.get_method(name)


def test_cross_entropy_and_accuracy(x64):
  logits, labels = logits_of([[0.9, 0.1], [0.2, 0.8]]), jnp.array([0, 0])
  loss = loss_functions.cross_entropy(logits, labels)
  np.testing.assert_allclose(loss, -np.log(0.9 * 0.2) / 2, rtol=1e-12)
  right = loss_functions.is_right(logits, labels)
  np.testing.assert_array_equal(right, [1, 0])


def test_smoothed_labels(x64):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(5, 4)), rng.integers(0, 4, 5)
  task = objectives.smoothed(objectives.CLASSIFICATION, 0.2)
  seen = task.loss(jnp.array(logits), jnp.array(labels))
  wanted = 0.8 * np.eye(4)[labels] + 0.2 / 4
  log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -(wanted * log_probabilities).sum(axis=-1).mean()
  np.testing.assert_allclose(seen, expected, rtol=1e-12)
  torch = pytest.importorskip("torch")
  theirs = torch.nn.functional.cross_entropy(
    torch.tensor(logits), torch.tensor(labels), label_smoothing=0.2
  )
  np.testing.assert_allclose(seen, theirs.numpy(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_softened_cross_entropy(temperature, x64):
  source = logits_of([[0.75, 0.25], [0.5, 0.5]], temperature)
  logits = logits_of([[0.9, 0.1], [0.2, 0.8]], temperature)
  loss = loss_functions.softened_cross_entropy(
    logits, source, temperature=temperature
  )
  first = -(0.75 * np.log(0.9) + 0.25 * np.log(0.1))
  second = -(0.5 * np.log(0.2) + 0.5 * np.log(0.8))
  np.testing.assert_allclose(loss, (first + second) / 2, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_loss(temperature, x64):
  source = logits_of([[0.75, 0.25]], temperature)
  logits = logits_of([[0.9, 0.1]], temperature)
  loss = loss_functions.distillation_loss(
    logits, source, temperature=temperature
  )
  divergence = 0.75 * np.log(0.75 / 0.9) + 0.25 * np.log(0.25 / 0.1)
  np.testing.assert_allclose(loss, temperature**2 * divergence, rtol=1e-12)
  same = loss_functions.distillation_loss(
    source, source, temperature=temperature
  )
  assert same == 0


def test_hot_distillation_matches_logits(x64):
  """The limit of section 2.1: (z - z_s) / K if logits have mean zero."""
  rng = np.random.default_rng(0)
  logits, source = rng.standard_normal((2, 1, 5))
  logits -= logits.mean()
  source -= source.mean()
  grads = jax.grad(loss_functions.distillation_loss)(
    jnp.array(logits), jnp.array(source), temperature=1e4
  )
  np.testing.assert_allclose(grads, (logits - source) / 5, rtol=1e-3)


def test_attention(x64):
  # Two positions; energies 1 and 2 against 3 and 4.
  source = jnp.array([[[[1.0, 1.0], [2.0, 0.0]]]])
  target = jnp.sqrt(jnp.array([[[[3.0], [4.0]]]]))
  ours = loss_functions.attention_map(source)
  np.testing.assert_allclose(ours, [[1 / 5**0.5, 2 / 5**0.5]], rtol=1e-12)
  by_hand = ((1 / 5**0.5 - 0.6) ** 2 + (2 / 5**0.5 - 0.8) ** 2) / 2
  loss = loss_functions.attention_loss(source, target)
  np.testing.assert_allclose(loss, by_hand, rtol=1e-12)
  # Attention maps do not depend on the scale of the features.
  scaled = loss_functions.attention_loss(3 * source, 0.1 * target)
  np.testing.assert_allclose(scaled, by_hand, rtol=1e-12)


def test_attention_to_a_map_of_zeros_is_differentiable():
  source = jnp.ones((1, 2, 2, 3))
  loss, grads = jax.value_and_grad(loss_functions.attention_loss, argnums=1)(
    source, jnp.zeros((1, 2, 2, 5))
  )
  np.testing.assert_allclose(loss, 0.25, rtol=1e-6)  # (1/2 - 0)² of each.
  np.testing.assert_array_equal(grads, 0)


def outputs(num_images=2):
  """Return (target outputs, source outputs, pairs) of random features."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.array(rng.standard_normal((num_images, *shape)))
  pairs = (pair_sets.Pair("s", "t1"), pair_sets.Pair("s", "t2"))
  target = objectives.TargetOutputs(
    draw(3), {"t1": draw(4, 4, 5), "t2": draw(2, 2, 6)}
  )
  maps = transfer.prepare_source(
    {"s": draw(4, 4, 7)}, pairs, {"t1": (4, 4, 5), "t2": (2, 2, 6)}
  )
  source = objectives.SourceOutputs({"a": draw(3), "b": draw(2)}, maps)
  return target, source, pairs


def test_attention_is_summed_over_pairs_at_the_targets_size(x64):
  target, source, pairs = outputs()
  loss_fn = objectives.attention(pairs, beta=10.0)
  loss, _ = loss_fn({}, None, target, source)
  by_hand = sum(
    10
    * loss_functions.attention_loss(
      source.matching.maps[tap], target.features[tap]
    )
    for tap in ("t1", "t2")
  )
  np.testing.assert_allclose(loss, by_hand, rtol=1e-12)


def _unit_rows(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_aft_compares_how_images_relate(x64):
  """With learned weights of the channels of both source taps."""
  target, source, _ = outputs(num_images=4)
  pairs = (pair_sets.Pair("s", "t1"), pair_sets.Pair("r", "t1"))
  rng = np.random.default_rng(1)
  pooled = {"s": rng.normal(size=(4, 2)), "r": rng.normal(size=(4, 3))}
  maps = source.matching._replace(pooled=pooled)
  scores = rng.normal(size=5)
  loss, metrics = objectives.aft(pairs, weight=3.0)(
    {"aft": {"t1": scores}}, None, target, source._replace(matching=maps)
  )
  scaled = np.concatenate([pooled["s"], pooled["r"]], 1) / (1 + np.exp(-scores))
  kernels = []
  for x in (np.mean(target.features["t1"], (1, 2)), scaled):
    unit = _unit_rows(x - x.mean(axis=0))
    kernels.append(unit @ unit.T)
  by_hand = 3 * np.sqrt(np.mean((kernels[0] - kernels[1]) ** 2) + 1e-8)
  np.testing.assert_allclose(loss, by_hand, rtol=1e-12)
  assert not metrics
  start = objectives.init_channel_scales(
    pairs, {"s": (1, 1, 2), "r": (1, 1, 3)}
  )
  chex.assert_trees_all_equal(start, {"t1": np.zeros(5)})


def test_aft_of_equal_relations_is_next_to_nothing(x64):
  """Scale, rotation and offset of the features do not matter."""
  x = np.random.default_rng(0).normal(size=(5, 3))
  rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
  loss = loss_functions.kernel_distance(
    jnp.array(x), jnp.array(2 * x @ rotation + 1)
  )
  np.testing.assert_allclose(loss, 1e-4, rtol=1e-6)  # The root of 1e-8.


def test_aft_of_one_constant_image_is_differentiable():
  x = jnp.zeros((3, 2))
  grads = jax.grad(loss_functions.kernel_distance)(x, jnp.ones((3, 4)))
  np.testing.assert_array_equal(grads, 0)


def test_afd_by_hand(x64):
  """Equations of the paper, image by image, in NumPy."""
  target, source, pairs = outputs(num_images=3)
  taps = {"s": (4, 4, 7)}, {"t1": (4, 4, 5), "t2": (2, 2, 6)}
  params = attention_distillation.init(jax.random.key(0), pairs, *taps, dim=4)
  rng = np.random.default_rng(2)
  params = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), params)
  loss, metrics = objectives.afd(pairs, weight=5.0)(
    {"afd": params}, None, target, source
  )

  def normalised(layer, x):
    y = x @ layer["kernel"] + layer["bias"]
    rows = y.reshape(-1, y.shape[-1])
    y = (y - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-5)
    return layer["scale"] * y + layer["shift"]

  query = normalised(params["query"]["s"], source.matching.pooled["s"])
  pooled = {n: np.mean(x, (1, 2)) for n, x in target.features.items()}
  keys = np.stack(
    [
      np.maximum(normalised(params["key"][n], pooled[n]), 0)
      for n in ("t1", "t2")
    ],
    axis=1,
  )
  keys = normalised(params["bilinear"]["s"], keys)
  positions = [
    params["source_position"]["s"] @ params["target_position"][n]
    for n in ("t1", "t2")
  ]
  scores = (np.einsum("bd,bnd->bn", query, keys) + np.array(positions)) / 2
  attention = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
  energy = np.mean(target.features["t2"] ** 2, axis=-1)
  energies = {
    "s": source.matching.energies["s"],
    "t1": np.mean(target.features["t1"] ** 2, axis=-1),
    "t2": energy.repeat(2, axis=1).repeat(2, axis=2),  # To the source's 4x4.
  }
  unit = {n: _unit_rows(x.reshape(3, -1)) for n, x in energies.items()}
  distances = np.stack(
    [np.mean((unit["s"] - unit[n]) ** 2, axis=1) for n in ("t1", "t2")], axis=1
  )
  np.testing.assert_allclose(
    loss, 5 * np.mean(np.sum(attention * distances, axis=1)), rtol=1e-12
  )
  for i, name in enumerate(("s->t1", "s->t2")):
    np.testing.assert_allclose(
      metrics["pair_weights"][name], attention[:, i].mean(), rtol=1e-12
    )
    np.testing.assert_allclose(
      metrics["distances"][name], distances[:, i].mean(), rtol=1e-12
    )


def test_afd_is_differentiable(x64):
  target, source, pairs = outputs(num_images=3)
  taps = {"s": (4, 4, 7)}, {"t1": (4, 4, 5), "t2": (2, 2, 6)}
  params = attention_distillation.init(jax.random.key(0), pairs, *taps, dim=4)
  loss_fn = objectives.afd(pairs, weight=1.0)

  def loss(params, features):
    return loss_fn(
      {"afd": params}, None, target._replace(features=features), source
    )[0]

  test_util.check_grads(loss, (params, target.features), 1, ["rev"], eps=1e-6)


@pytest.mark.parametrize(("old", "new"), [(4, 3), (5, 2), (3, 7), (6, 6)])
def test_adaptive_means_are_pytorchs(old, new, x64):
  torch = pytest.importorskip("torch")
  maps = np.random.default_rng(0).normal(size=(2, old, old + 1))
  ours = attention_distillation.adaptive_mean(jnp.array(maps), (new, 2))
  pool = torch.nn.AdaptiveAvgPool2d((new, 2))
  np.testing.assert_allclose(ours, pool(torch.tensor(maps)).numpy(), rtol=1e-12)


def test_lwf_has_a_head_for_each_source(x64):
  target, source, _ = outputs()
  heads = objectives.init_heads(jax.random.key(0), 6, {"a": 3, "b": 2})
  assert heads["a"]["kernel"].shape == (6, 3)
  loss_fn = objectives.lwf("t2", temperature=2.0, weight=0.5)
  loss, _ = loss_fn({"heads": heads}, None, target, source)
  pooled = np.asarray(target.features["t2"]).mean((1, 2))
  by_hand = 0.0
  for name in "ab":
    logits = pooled @ heads[name]["kernel"] + heads[name]["bias"]
    by_hand += loss_functions.softened_cross_entropy(
      logits, source.logits[name], temperature=2.0
    )
  np.testing.assert_allclose(loss, 0.5 * by_hand, rtol=1e-12)


def test_kd_reads_the_targets_own_logits(x64):
  """From each source; it is all that is added to the task's loss."""
  target, source, _ = outputs()
  one = source.logits["a"]
  source = source._replace(logits={"a": one, "b": 1 - one})
  kd = objectives.kd(temperature=3.0, weight=2.0)
  loss, _ = kd({}, None, target, source)
  by_hand = sum(
    loss_functions.distillation_loss(target.logits, logits, temperature=3.0)
    for logits in (one, 1 - one)
  )
  np.testing.assert_allclose(loss, 2 * by_hand, rtol=1e-12)
  apply_fn = lambda params, state, images, train: (target.logits, {}, state)
  losses = objectives.make_losses(apply_fn, {"kd": kd})
  labels = jnp.array([0, 2])
  batch = objectives.TransferBatch(labels, labels, source=source)
  of_task, auxiliary, total, update = (
    loss_fn({"target": {}}, None, {}, batch)[0] for loss_fn in losses
  )
  cross_entropy = loss_functions.cross_entropy(target.logits, labels)
  np.testing.assert_allclose(of_task, cross_entropy, rtol=1e-12)
  np.testing.assert_allclose(auxiliary, 2 * by_hand, rtol=1e-12)
  np.testing.assert_allclose(total, of_task + auxiliary, rtol=1e-12)
  assert update == total


def test_bfloat16_outputs_are_compared_in_float32():
  """For any task, in the losses and in evaluation."""
  narrow = lambda shape, seed: jnp.asarray(
    np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16
  )
  task = types.Task(
    lambda outputs, labels: jnp.mean((outputs - labels) ** 2),
    lambda outputs, labels: -((outputs[:, 0] - labels[:, 0]) ** 2),
  )
  labels = jnp.ones((8, 3))

  def values(logits, source_logits):
    apply_fn = lambda params, state, images, train: (logits, {}, state)
    kd = objectives.kd(temperature=4.0, weight=1.0)
    losses = objectives.make_losses(apply_fn, {"kd": kd}, task)
    source = objectives.SourceOutputs({"": source_logits}, None)
    batch = objectives.TransferBatch(labels, labels, source=source)
    _, (_, metrics) = losses.total({"target": {}}, None, {}, batch)
    evaluated = training.make_eval_step(apply_fn, task)(
      types.InnerState({"target": {}}, {}, {}),
      types.EvalBatch(labels, labels, jnp.ones(8)),
    )
    return metrics, evaluated

  logits, source_logits = narrow((8, 3), 0), narrow((8, 3), 1)
  wide = values(*(x.astype(jnp.float32) for x in (logits, source_logits)))
  chex.assert_trees_all_equal(values(logits, source_logits), wide)
