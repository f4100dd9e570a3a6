"""The paper's equations against numbers computed by hand or by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import errors
from l2t_jax.method import pair_sets, transfer

SOURCE = {"m1": (4, 4, 2), "m2": (2, 2, 3)}
TARGET = {"n1": (4, 4, 5), "n2": (2, 2, 4), "n3": (1, 1, 6)}


def features(taps, seed, batch=3):
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.standard_normal((batch, *shape)))
    for name, shape in taps.items()
  }


def all_pairs():
  return pair_sets.make_pairs("all_to_all", SOURCE, TARGET)


def names(pair_set):
  return [p.name for p in pair_sets.make_pairs(pair_set, SOURCE, TARGET)]


def test_pair_sets():
  assert names("single") == ["m2->n3"]
  assert names("one_to_one") == ["m1->n1", "m2->n2"]
  assert names("all_to_all") == [
    "m1->n1", "m1->n2", "m1->n3", "m2->n1", "m2->n2", "m2->n3"
  ]  # fmt: skip
  assert names("nearest") == ["m1->n1", "m2->n2", "m2->n3"]
  assert names("m2->n1, m1->n3") == ["m2->n1", "m1->n3"]
  assert names([("m2", "n1"), "m1->n3"]) == ["m2->n1", "m1->n3"]
  # Of several taps of the nearest resolution, the deepest.
  alike = {"shallow": (4, 4, 2), "deep": (4, 4, 2)}
  pairs = pair_sets.make_pairs("nearest", alike, {"n1": TARGET["n1"]})
  assert pairs == (("deep", "n1"),)


@pytest.mark.parametrize(
  ("pair_set", "message"),
  [
    ("some", "unknown pair set 'some'; use one of single"),
    ("m3->n1", "unknown source tap 'm3'; the source's taps are m1, m2"),
    ("m1->n9", "unknown target tap 'n9'; the target's taps are n1, n2, n3"),
    ("m1->n1,m1->n1", "'m1->n1' is listed twice"),
    (["m1"], "'m1' is not of the form"),
    ([], "no pairs"),
  ],
)
def test_wrong_pairs(pair_set, message):
  with pytest.raises(errors.InputError, match=message):
    pair_sets.make_pairs(pair_set, SOURCE, TARGET)


def test_no_pair_of_equal_resolution():
  with pytest.raises(errors.InputError, match="m1 4x4, m2 2x2; n3 1x1"):
    pair_sets.make_pairs("one_to_one", SOURCE, {"n3": (1, 1, 6)})


def test_weights_start_uniform_and_near_one():
  meta_params = transfer.init_meta_params(
    jax.random.key(0),
    all_pairs(),
    SOURCE,
    learn_channels=True,
    learn_pairs=True,
  )
  pooled = {"m1": jnp.zeros((2, 2)), "m2": jnp.ones((2, 3))}
  weights = transfer.transfer_weights(meta_params, pooled, all_pairs())
  for pair in all_pairs():
    channels = SOURCE[pair.source][-1]
    np.testing.assert_allclose(
      weights.channel[pair.name], np.full((2, channels), 1 / channels)
    )
    kernel = meta_params["pair"][pair.name]["kernel"]
    assert np.abs(kernel).max() <= channels**-0.5
    expected = 1 + pooled[pair.source] @ kernel[:, 0]
    np.testing.assert_allclose(weights.pair[pair.name], expected, rtol=1e-6)


def test_weights_by_hand():
  pair = pair_sets.Pair("m", "n")
  meta_params = {
    "channel": {
      pair.name: {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]]),
        "bias": jnp.array([0.0, 1.0]),
      }
    },
    "pair": {
      pair.name: {
        "kernel": jnp.array([[1.0], [2.0]]),
        "bias": jnp.array([1.0]),
      }
    },
  }
  pooled = {"m": jnp.array([[0.5, 0.25], [3.0, 2.0], [-3.0, 0.0]])}
  weights = transfer.transfer_weights(meta_params, pooled, (pair,))
  # λ: 0.5 + 0.5 + 1; 3 + 4 + 1 is cut to 6; -3 + 1 to 0.
  np.testing.assert_allclose(weights.pair[pair.name], [2, 6, 0])
  # w, first image: softmax(0.5, 1.5).
  odds = np.exp(1.0)
  np.testing.assert_allclose(
    weights.channel[pair.name][0],
    [1 / (1 + odds), odds / (1 + odds)],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    weights.channel[pair.name].sum(axis=-1), 1, rtol=1e-6
  )


def test_fixed_weights_are_uniform_and_one():
  pooled = {"m1": jnp.ones((2, 2)), "m2": jnp.ones((2, 3))}
  weights = transfer.transfer_weights({}, pooled, all_pairs())
  np.testing.assert_allclose(weights.channel["m2->n1"], np.full((2, 3), 1 / 3))
  np.testing.assert_allclose(weights.pair["m2->n1"], [1, 1])


def test_resize_has_half_pixel_centres_and_no_antialiasing():
  row = jnp.arange(8.0)
  image = jnp.broadcast_to(row[None, None, :, None], (1, 8, 8, 1))
  pair = pair_sets.Pair("m", "n")
  small = transfer.prepare_source({"m": image}, (pair,), {"n": (2, 2, 1)})
  # Centres at 1.5 and 5.5; antialiasing would give 1.7 and 5.3.
  np.testing.assert_allclose(small.maps["n"][0, 0, :, 0], [1.5, 5.5])
  same = transfer.prepare_source({"m": image}, (pair,), {"n": (8, 8, 1)})
  np.testing.assert_array_equal(same.maps["n"], image)
  large = transfer.prepare_source({"m": image}, (pair,), {"n": (16, 16, 1)})
  np.testing.assert_allclose(
    large.maps["n"][0, 0, :4, 0], [0, 0.25, 0.75, 1.25]
  )


def test_source_is_resized_once_per_resolution():
  targets = {"a": (2, 2, 4), "b": (2, 2, 8), "c": (4, 4, 4)}
  pairs = pair_sets.make_pairs("all_to_all", {"m1": SOURCE["m1"]}, targets)
  maps = transfer.prepare_source(features(SOURCE, 0), pairs, targets)
  assert sorted(maps.maps) == ["a", "b", "c"]
  assert maps.maps["a"] is maps.maps["b"]
  np.testing.assert_allclose(
    maps.pooled["m1"], features(SOURCE, 0)["m1"].mean(axis=(1, 2)), rtol=1e-6
  )


def test_source_maps_are_constants():
  pairs = pair_sets.make_pairs("m2->n2", SOURCE, TARGET)
  total = lambda x: sum(
    jnp.sum(leaf)
    for leaf in jax.tree.leaves(transfer.prepare_source(x, pairs, TARGET))
  )
  slopes = jax.grad(total)({"m2": jnp.ones((1, *SOURCE["m2"]))})
  np.testing.assert_array_equal(slopes["m2"], 0)


def test_distances_and_loss_equal_loops(x64):
  pairs = all_pairs()
  target_features = features(TARGET, 1)
  maps = transfer.prepare_source(features(SOURCE, 0), pairs, TARGET)
  regressors = transfer.init_regressors(
    jax.random.key(2), pairs, SOURCE, TARGET
  )
  rng = np.random.default_rng(3)
  weights = transfer.TransferWeights(
    {p.name: jnp.asarray(rng.random((3, SOURCE[p.source][-1]))) for p in pairs},
    {p.name: jnp.asarray(rng.random(3)) for p in pairs},
  )
  expected = 0.0
  for p in pairs:
    height, width, _ = TARGET[p.target]
    layer = regressors[p.name]
    source_maps = transfer.source_map(maps, p, pairs)
    for b in range(3):
      for c in range(SOURCE[p.source][-1]):
        d = 0.0
        for i in range(height):
          for j in range(width):
            regressed = (
              np.dot(target_features[p.target][b, i, j], layer["kernel"][:, c])
              + layer["bias"][c]
            )
            wanted = source_maps[b, i, j, c]
            d += (wanted - regressed) ** 2 / (height * width)
        w = weights.channel[p.name][b, c]
        expected += 0.5 * weights.pair[p.name][b] * w * d / 3
  distances = transfer.channel_distances(
    regressors, target_features, maps, pairs
  )
  loss = transfer.matching_loss(distances, weights, beta=0.5)
  np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_regressors_start_as_in_torch():
  pairs = pair_sets.make_pairs("m1->n3", SOURCE, {"n3": (1, 1, 10_000)})
  layer = transfer.init_regressors(
    jax.random.key(0), pairs, SOURCE, {"n3": (1, 1, 10_000)}
  )["m1->n3"]
  assert layer["kernel"].shape == (10_000, 2)
  assert layer["bias"].shape == (2,)
  # Uniform within ±0.01: the standard deviation is 0.01 / sqrt(3).
  assert np.abs(layer["kernel"]).max() <= 0.01
  np.testing.assert_allclose(layer["kernel"].std(), 0.01 / 3**0.5, rtol=0.02)


def test_bfloat16_features_are_matched_in_float32():
  pairs = all_pairs()
  half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  maps = transfer.prepare_source(half(features(SOURCE, 0)), pairs, TARGET)
  regressors = transfer.init_regressors(
    jax.random.key(2), pairs, SOURCE, TARGET
  )
  distances = transfer.channel_distances(
    regressors, half(features(TARGET, 1)), maps, pairs
  )
  assert {d.dtype.name for d in distances.values()} == {"float32"}


def test_a_pairs_initial_values_do_not_depend_on_the_others():
  some = pair_sets.make_pairs("m2->n1, m1->n3", SOURCE, TARGET)
  key = jax.random.key(0)
  options = {"learn_channels": True, "learn_pairs": True}
  for init in (
    lambda pairs: transfer.init_regressors(key, pairs, SOURCE, TARGET),
    lambda pairs: transfer.init_meta_params(key, pairs, SOURCE, **options)[
      "pair"
    ],
  ):
    every, few = init(all_pairs()), init(some)
    for pair in some:
      for name in ("kernel", "bias"):
        np.testing.assert_array_equal(
          few[pair.name][name], every[pair.name][name]
        )
    kernels = [every[pair.name]["kernel"] for pair in all_pairs()]
    assert len({float(kernel[0, 0]) for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize(
  ("activation", "values", "slopes"),
  [
    ("relu6", [0, 2, 6], [0, 1, 0]),
    ("relu", [0, 2, 7], [0, 1, 1]),
    (
      "softplus",
      np.log1p(np.exp([-1, 2, 7])),
      1 / (1 + np.exp(-np.array([-1.0, 2, 7]))),
    ),
  ],
)
def test_pair_activations(activation, values, slopes, x64):
  """g's outputs are -1, 2 and 7."""
  pairs = pair_sets.make_pairs("m1->n1", SOURCE, TARGET)
  pooled = {"m1": jnp.array([[-1.0, 0.0], [2.0, 0.0], [7.0, 0.0]])}

  def weights(bias):
    layer = {"kernel": jnp.array([[1.0], [0.0]]), "bias": bias}
    return transfer.transfer_weights(
      {"pair": {"m1->n1": layer}}, pooled, pairs, activation=activation
    ).pair["m1->n1"]

  np.testing.assert_allclose(weights(jnp.zeros(1)), values, rtol=1e-12)
  jacobian = jax.jacobian(weights)(jnp.zeros(1))[:, 0]
  np.testing.assert_allclose(jacobian, slopes, rtol=1e-12)


def test_pairs_compete_under_softmax(x64):
  """λ is P times a softmax over the pairs, for each image by itself."""
  pairs = pair_sets.make_pairs("m1->n1,m2->n1", SOURCE, TARGET)
  pooled = {"m1": jnp.array([[1.0], [0.0]]), "m2": jnp.array([[3.0], [0.0]])}
  layer = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}
  seen = transfer.transfer_weights(
    {"pair": {pair.name: layer for pair in pairs}},
    pooled,
    pairs,
    activation="softmax",
  ).pair
  larger = np.exp(3) / (np.exp(1) + np.exp(3))
  np.testing.assert_allclose(seen["m1->n1"], [2 - 2 * larger, 1], rtol=1e-12)
  np.testing.assert_allclose(seen["m2->n1"], [2 * larger, 1], rtol=1e-12)
  assert transfer.largest_pair_weight("softmax", 2) == 2


@pytest.mark.parametrize(
  ("activation", "start", "maximum"),
  [
    ("relu6", 1, 6),
    ("relu", 1, np.inf),
    ("softplus", np.log(1 + np.e), np.inf),
  ],
)
def test_where_pair_weights_start_and_end(activation, start, maximum):
  assert transfer.largest_pair_weight(activation, 1) == maximum
  pairs = pair_sets.make_pairs("m1->n1", SOURCE, TARGET)
  meta_params = transfer.init_meta_params(
    jax.random.key(0), pairs, SOURCE, learn_channels=False, learn_pairs=True
  )
  pooled = {"m1": jnp.zeros((1, SOURCE["m1"][-1]))}  # g's kernel is idle.
  weights = transfer.transfer_weights(
    meta_params, pooled, pairs, activation=activation
  )
  np.testing.assert_allclose(weights.pair["m1->n1"], start, rtol=1e-6)


def test_a_map_is_repeated_for_every_image():
  given = transfer.TransferMap(
    {"m1->n1": np.array([0.25, 0.75])}, {"m1->n1": 3.0}
  )
  weights = transfer.repeat_map(given, {"m1": jnp.zeros((4, 2))})
  np.testing.assert_array_equal(weights.channel["m1->n1"], [[0.25, 0.75]] * 4)
  np.testing.assert_array_equal(weights.pair["m1->n1"], [3.0] * 4)
  loss = transfer.matching_loss(
    {"m1->n1": jnp.array([[4.0, 8.0]] * 4)}, weights, beta=0.5
  )
  np.testing.assert_allclose(loss, 0.5 * 3 * (0.25 * 4 + 0.75 * 8))
