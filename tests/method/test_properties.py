"""What holds for every batch size, shape, T, set of pairs and optimizer.

Examples are drawn by hypothesis, the same ones every time (see conftest.py).
Where a program has to be compiled for each of them, they are few.
"""

import dataclasses
import functools
from unittest import mock

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax import data, types
from l2t_jax.data import datasets, records, splits
from l2t_jax.method import bilevel, pair_sets, transfer
from tests.support import drawn_setup

given = hypothesis.given
SEEDS = st.integers(0, 2**16)
OTHER_MODES = st.sampled_from(sorted(set(bilevel.MODES) - {"linearized"}))


def few(max_examples):
  """Settings for examples that compile; shrinking them would take minutes."""
  return hypothesis.settings(
    max_examples=max_examples,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
  )


def in_float64(test):
  """Compute in float64; a fixture would not be set up for each example."""

  @functools.wraps(test)
  def wrapped(*args, **kwargs):
    with jax.enable_x64(True):
      test(*args, **kwargs)

  return wrapped


def close(rtol=1e-9, atol=1e-13):
  return functools.partial(chex.assert_trees_all_close, rtol=rtol, atol=atol)


@dataclasses.dataclass
class Matching:
  """Inputs of the matching loss; arrays are NumPy's, in float64."""

  target_taps: dict[str, tuple[int, int, int]]
  pairs: tuple[pair_sets.Pair, ...]
  meta_params: dict
  regressors: dict
  source: dict  # m -> [B, H, W, C_m].
  target: dict  # n -> [B, H, W, C_n].

  def maps(self):
    source = jax.tree.map(jnp.asarray, self.source)
    return transfer.prepare_source(source, self.pairs, self.target_taps)

  def weights(self, activation="relu6"):
    return transfer.transfer_weights(
      self.meta_params, self.maps().pooled, self.pairs, activation=activation
    )

  def distances(self):
    regressors, target = jax.tree.map(
      jnp.asarray, (self.regressors, self.target)
    )
    return transfer.channel_distances(
      regressors, target, self.maps(), self.pairs
    )

  def loss(self, beta=0.5):
    return transfer.matching_loss(self.distances(), self.weights(), beta=beta)


@st.composite
def matchings(draw):
  """Draw taps of any resolutions, pairs and values of any size."""
  # Few sizes, because every operation is compiled for each shape.
  side, channels = st.sampled_from((1, 2, 5)), st.sampled_from((1, 3))
  shapes = st.lists(st.tuples(side, side, channels), min_size=1, max_size=2)
  source_taps, target_taps = (
    {f"{name}{index}": shape for index, shape in enumerate(draw(shapes))}
    for name in "mn"
  )
  sets = set(pair_sets.PAIR_SETS)
  resolutions = lambda taps: {shape[:2] for shape in taps.values()}
  if not resolutions(source_taps) & resolutions(target_taps):
    sets.remove("one_to_one")
  pair_set = draw(st.sampled_from(sorted(sets)))
  pairs = pair_sets.make_pairs(pair_set, source_taps, target_taps)
  batch_size = draw(st.sampled_from((1, 2, 5)))
  scale = draw(st.sampled_from((1e-3, 1.0, 1e3)))
  rng = np.random.default_rng(draw(SEEDS))
  random = lambda *shape: rng.standard_normal(shape)
  layer = lambda inputs, outputs: {
    "kernel": scale * random(inputs, outputs),
    "bias": scale * random(outputs),
  }
  channels = {p: source_taps[p.source][-1] for p in pairs}
  features = lambda taps: {
    name: scale * random(batch_size, *shape) for name, shape in taps.items()
  }
  return Matching(
    target_taps,
    pairs,
    {
      "channel": {p.name: layer(channels[p], channels[p]) for p in pairs},
      "pair": {p.name: layer(channels[p], 1) for p in pairs},
    },
    {p.name: layer(target_taps[p.target][-1], channels[p]) for p in pairs},
    features(source_taps),
    features(target_taps),
  )


def resize(x, height, width):
  """Bilinear, half-pixel centres, no antialiasing; [B, H, W, C]."""
  for axis, size in ((1, height), (2, width)):
    old = x.shape[axis]
    centres = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, old - 1)
    share = (centres - low).reshape([-1 if a == axis else 1 for a in range(4)])
    x = (1 - share) * np.take(x, low, axis) + share * np.take(x, high, axis)
  return x


@few(12)
@given(matchings())
@in_float64
def test_channel_weights_sum_to_1(example):
  for channel in example.weights().channel.values():
    assert channel.min() >= 0
    np.testing.assert_allclose(channel.sum(axis=-1), 1, rtol=1e-12)


@few(12)
@given(matchings(), st.sampled_from(sorted(transfer.PAIR_ACTIVATIONS)))
@in_float64
def test_pair_weights_are_bounded(example, activation):
  """In [0, 6] with the paper's activation; non-negative with all."""
  pair = np.stack(list(example.weights(activation).pair.values()))
  assert pair.min() >= 0
  if activation == "relu6":
    assert pair.max() <= 6


@few(12)
@given(matchings(), st.floats(-100, 100))
@in_float64
def test_a_constant_in_the_logits_does_not_change_channel_weights(
  example, constant
):
  channel = example.weights().channel
  for layer in example.meta_params["channel"].values():
    layer["bias"] += constant
  # The largest logit limits the precision.
  close(rtol=1e-7, atol=1e-12)(example.weights().channel, channel)


@few(12)
@given(matchings(), st.floats(0, 10))
@in_float64
def test_the_matching_loss_is_numpys(example, beta):
  """Including the resizing; and it is non-negative."""
  example_weights = example.weights()
  expected = 0.0
  for pair in example.pairs:
    target = np.asarray(example.target[pair.target])
    layer = jax.tree.map(np.asarray, example.regressors[pair.name])
    source = np.asarray(example.source[pair.source])
    gap = resize(source, *target.shape[1:3])
    gap = gap - (target @ layer["kernel"] + layer["bias"])
    channel, pair_weight = (
      np.asarray(weights[pair.name]) for weights in example_weights
    )
    by_image = (channel * np.mean(gap**2, axis=(1, 2))).sum(axis=-1)
    expected += beta * np.mean(pair_weight * by_image)
  loss = example.loss(beta)
  assert loss >= 0
  np.testing.assert_allclose(loss, expected, rtol=1e-9, atol=1e-300)


@few(12)
@given(matchings(), st.floats(0, 10), st.floats(0, 10))
@in_float64
def test_the_matching_loss_is_linear_in_beta(example, one, other):
  np.testing.assert_allclose(
    example.loss(one) + example.loss(other),
    example.loss(one + other),
    rtol=1e-12,
    atol=1e-300,
  )


@few(12)
@given(matchings(), SEEDS)
@in_float64
def test_the_order_of_images_does_not_matter(example, seed):
  """Weights follow the order of the images; the loss does not change."""
  weights, loss = example.weights(), example.loss()
  batch_size = len(next(iter(example.source.values())))
  order = np.random.default_rng(seed).permutation(batch_size)
  permute = functools.partial(jax.tree.map, lambda x: x[order])
  example.source, example.target = map(
    permute, (example.source, example.target)
  )
  close(rtol=1e-7)(example.weights(), permute(weights))
  np.testing.assert_allclose(example.loss(), loss, rtol=1e-9, atol=1e-300)


@few(12)
@given(matchings(), SEEDS)
@in_float64
def test_the_order_of_pairs_does_not_matter(example, seed):
  """For weights, distances and loss; a test of whole steps is below."""
  before = example.weights(), example.distances(), example.loss()
  order = np.random.default_rng(seed).permutation(len(example.pairs))
  example.pairs = tuple(example.pairs[index] for index in order)
  after = example.weights(), example.distances(), example.loss()
  close(rtol=1e-9, atol=1e-300)(after, before)


@dataclasses.dataclass
class Inner:
  """A small inner problem: a network with batch norm, weighted examples."""

  num_inputs: int
  num_hidden: int
  batch_size: int
  seed: int

  def __post_init__(self):
    # NumPy arrays, because examples are made outside of `in_float64`.
    rng = np.random.default_rng(self.seed)
    random = lambda *shape: rng.standard_normal(shape)
    self.params = {
      "in": random(self.num_inputs, self.num_hidden),
      "out": random(self.num_hidden),
    }
    self.meta_params = {"u": random(self.num_inputs), "v": random()}
    self.batch = (
      random(self.batch_size, self.num_inputs),
      random(self.batch_size),
    )

  def loss(self, params, meta_params, model_state, batch):
    inputs, wanted = batch
    hidden = inputs @ params["in"]
    hidden -= hidden.mean(axis=0)
    hidden /= jnp.sqrt(jnp.mean(hidden**2, axis=0) + 0.1)
    errors = jnp.tanh(hidden) @ params["out"] - wanted
    weights = jax.nn.softplus(inputs @ meta_params["u"] + meta_params["v"])
    return jnp.mean(weights * errors**2), model_state + 1

  def hypergradient_fn(self, optimizer, num_steps, mode, rolled):
    step = bilevel.make_inner_step(self.loss, optimizer, mode=mode)
    params, batch = jax.tree.map(jnp.asarray, (self.params, self.batch))
    state = types.InnerState(params, optimizer.init(params), jnp.zeros(()))

    def look_ahead(state, meta_params, batch):
      return bilevel.unroll(
        step, state, meta_params, batch, num_steps=num_steps, rolled=rolled
      )[0]

    def outer_loss(params, meta_params, model_state, batch):
      inputs, wanted = batch
      uniform = jax.tree.map(jnp.zeros_like, meta_params)
      return self.loss(params, uniform, model_state, (inputs, wanted + 1))

    return jax.jit(
      lambda meta_params: bilevel.hypergradient(
        look_ahead, outer_loss, state, meta_params, batch
      )
    )


@few(4)
@given(
  st.builds(
    Inner,
    num_inputs=st.sampled_from((2, 3, 1)),
    num_hidden=st.sampled_from((2, 3, 1)),
    batch_size=st.sampled_from((3, 4, 5, 2)),
    seed=SEEDS,
  ),
  st.sampled_from(tuple(drawn_setup.OPTIMIZERS)),
  st.sampled_from((3, 1, 2, 4)),
  st.booleans(),
  OTHER_MODES,
)
@in_float64
def test_hypergradients_agree(inner, optimizer, num_steps, rolled, mode):
  """Two modes agree with each other and with a central difference."""
  optimizer = drawn_setup.OPTIMIZERS[optimizer](0.1)
  usual, other = (
    inner.hypergradient_fn(optimizer, num_steps, one, rolled)
    for one in ("linearized", mode)
  )
  value, grads = usual(inner.meta_params)
  close(rtol=1e-8)(other(inner.meta_params), (value, grads))
  rng = np.random.default_rng(inner.seed)
  direction = jax.tree.map(
    lambda x: rng.standard_normal(x.shape), inner.meta_params
  )
  move = lambda size: jax.tree.map(
    lambda x, d: x + size * d, inner.meta_params, direction
  )
  size = 1e-5
  difference = (usual(move(size))[0] - usual(move(-size))[0]) / (2 * size)
  np.testing.assert_allclose(
    optax.tree.vdot(grads, direction),
    difference,
    rtol=1e-5,
    atol=1e-9,
  )


@few(2)
@given(drawn_setup.examples(num_inner_steps=(2, 1)), OTHER_MODES)
@in_float64
def test_modes_agree(drawn, mode):
  problem = drawn_setup.Problem(drawn)
  after, other = (
    jax.jit(problem.train_step(mode=one))(
      problem.state(), problem.sources, problem.batch
    )
    for one in ("linearized", mode)
  )
  close()(other, after)


@few(2)
@given(drawn_setup.examples(resolutions=(4,)))
@in_float64
def test_zero_pair_weights_give_the_scratch_update(drawn):
  """Bit by bit if run op by op, without a compiler that fuses operations."""
  problem = drawn_setup.Problem(drawn)
  after, _ = problem.train_step(update_meta=False)(
    with_zero_pair_weights(problem.state()), problem.sources, problem.batch
  )
  expected, _ = problem.train_step("scratch")(
    problem.state("scratch"), {}, problem.batch
  )
  chex.assert_trees_all_equal(
    after.inner.params["target"], expected.inner.params["target"]
  )
  chex.assert_trees_all_equal(
    after.inner.model_state, expected.inner.model_state
  )


def with_zero_pair_weights(state):
  """With parameters of 0, g's output and its derivative are 0."""
  zeros = jax.tree.map(jnp.zeros_like, state.meta_params["pair"])
  return state._replace(meta_params=state.meta_params | {"pair": zeros})


@few(2)
@given(
  drawn_setup.examples(
    num_source_taps=(2, 2),
    num_target_taps=(1, 1),
    pair_sets=("all_to_all",),
    num_inner_steps=(1,),
  ),
)
@in_float64
def test_a_step_does_not_depend_on_the_order_of_pairs(drawn):
  problem = drawn_setup.Problem(drawn)
  order = np.arange(len(problem.pairs))[::-1]
  permuted = drawn_setup.Problem(
    drawn, pairs=tuple(problem.pairs[index] for index in order)
  )
  (after, metrics), (other, other_metrics) = (
    jax.jit(one.train_step())(one.state(), one.sources, one.batch)
    for one in (problem, permuted)
  )
  close()(other, after)
  by_pair, other_by_pair = (
    metrics.pop("transfer"),
    other_metrics.pop("transfer"),
  )
  by_pair["meta_grad_norms"] = metrics.pop("meta_grad_norms")
  other_by_pair["meta_grad_norms"] = other_metrics.pop("meta_grad_norms")
  close()(other_metrics, metrics)
  close()(other_by_pair.pop("channel_weights"), by_pair.pop("channel_weights"))
  close()(other_by_pair, jax.tree.map(lambda x: x[order], by_pair))


def plans(max_processes=4, max_rows=6):
  """Draw the plans of all processes that train together."""
  return st.builds(
    lambda count, rows: [
      datasets.BatchPlan(count * rows, index, count) for index in range(count)
    ],
    st.integers(1, max_processes),
    st.integers(1, max_rows),
  )


@given(plans(), st.integers(0, 60))
def test_evaluation_counts_every_image_once(shares, num_images):
  seen = []
  for step in range(shares[0].num_eval_steps(num_images)):
    for share in shares:
      positions, mask = share.eval_positions(num_images, step)
      assert len(positions) == share.batch_size // share.process_count
      # Padding has to be read, too.
      assert ((positions >= 0) & (positions < num_images)).all()
      seen += positions[mask == 1].tolist()
      assert (positions[mask == 0] == 0).all()
  assert seen == list(range(num_images))


@given(plans(), st.integers(0, 20))
def test_processes_share_the_slots_of_a_step(shares, step):
  together = datasets.BatchPlan(shares[0].batch_size, 0, 1)
  np.testing.assert_array_equal(
    np.concatenate([share.slots(step) for share in shares]),
    together.slots(step),
  )


@few(3)
@given(plans(max_processes=3, max_rows=3), SEEDS, st.sampled_from((1, 128)))
def test_batches_of_several_processes_are_those_of_one(
  shares, seed, eval_batch_size
):
  """With augmentation; and evaluation sees each image once."""
  labels = np.arange(45, dtype=np.int32) % 3
  pixels = np.arange(45, dtype=np.uint8)[:, None, None, None]
  pixels = np.broadcast_to(5 * pixels, (45, 2, 2, 1))
  source = records.ImageSet(
    records.Records(labels, pixels=pixels), 0, None, tuple("abc")
  )

  def load(share):
    fields = data.DataFields(
      image_size=2,
      channels=1,
      mean=(0.0,),
      std=(1.0,),
      augment="crop_flip",
      crop_padding=1,
      val_fraction=0.2,
      test_fraction=0.4,
      split_seed=seed,
    )
    return data.load(fields, **share._asdict(), seed=seed, images=source)

  join = lambda parts: jax.tree.map(lambda *x: np.concatenate(x), *parts)
  sizes = (eval_batch_size, eval_batch_size)
  with mock.patch.object(datasets, "EVAL_BATCH_SIZES", sizes):
    together = load(datasets.BatchPlan(shares[0].batch_size, 0, 1))
    each = [load(share) for share in shares]
  for read in (
    lambda dataset: dataset.train_batches(1),
    lambda dataset: dataset.eval_batches("val"),
    lambda dataset: dataset.eval_batches("test"),
  ):
    parts = [join(part) for part in zip(*map(read, each), strict=True)]
    chex.assert_trees_all_equal(
      parts, jax.tree.map(np.asarray, list(read(together)))
    )
  evaluated = join(parts)
  assert evaluated.mask.sum() == together.num_test == 18
  values = evaluated.images[evaluated.mask == 1, 0, 0, 0]
  assert len(set(values.tolist())) == 18


def source_of_labels(labels):
  """Return a source whose images are never read."""
  labels = np.asarray(labels, np.int32)
  return records.ImageSet(records.Records(labels), 0, None, tuple("abcd"))


SHARES = st.floats(0, 0.49)


@given(
  st.lists(st.integers(0, 3), min_size=1, max_size=80), SHARES, SHARES, SEEDS
)
def test_splits_are_disjoint_stratified_and_cover_everything(
  labels, val_fraction, test_fraction, seed
):
  split = splits.seeded_split(
    source_of_labels(labels),
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    seed=seed,
  )
  labels = np.array(labels)
  together = np.sort(np.concatenate(split))
  np.testing.assert_array_equal(together, np.arange(len(labels)))
  counts = np.bincount(labels, minlength=4)
  for part, share in ((split.val, val_fraction), (split.test, test_fraction)):
    in_part = np.bincount(labels[part], minlength=4)
    assert np.abs(in_part - share * counts).max() <= 0.5


@given(
  st.lists(st.integers(6, 12), min_size=4, max_size=4),
  st.integers(1, 5),
  SEEDS,
)
def test_fewer_images_of_each_class_are_some_of_more(counts, per_class, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(range(4), counts))
  source = source_of_labels(labels)
  every = splits.seeded_split(
    source, val_fraction=0.0, test_fraction=0.0, seed=seed
  )
  few_images, more_images = (
    splits.keep_per_class(every, source, per_class=number, seed=seed).train
    for number in (per_class, per_class + 1)
  )
  np.testing.assert_array_equal(
    np.bincount(labels[few_images]), 4 * [per_class]
  )
  assert set(few_images) < set(more_images) <= set(every.train)


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 9), SEEDS)
def test_images_without_labels_come_pass_by_pass(
  num_images, batch_size, first, seed
):
  """Each pass is a permutation, wherever the stream is cut."""
  plan = datasets.BatchPlan(batch_size, 0, 1)
  read = functools.partial(
    datasets.stream_positions,
    seed,
    num_images=num_images,
    stream=datasets.UNLABELED,
  )
  for step in range(first, first + 3):
    slots = plan.slots(step)
    number = slots[0] // num_images
    passes = [
      read(np.arange(k * num_images, (k + 1) * num_images))
      for k in range(number, slots[-1] // num_images + 1)
    ]
    for one in passes:
      assert sorted(one) == list(range(num_images))
    start = slots[0] - number * num_images
    np.testing.assert_array_equal(
      read(slots), np.concatenate(passes)[start : start + batch_size]
    )
