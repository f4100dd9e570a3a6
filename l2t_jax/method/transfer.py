"""What and where to transfer: the paper's equations, for any networks.

Symbols, for a pair (m, n) of a source tap m and a target tap n and an image x:

  S^m(x), T^n(x)  features of source and target, [B, H, W, C]
  r^{m,n}         regressor, a 1x1 convolution with bias, C_n -> C_m
  w^{m,n}         channel weights, *what* to transfer, a softmax over C_m
  λ^{m,n}         pair weight, *where* and how much to transfer, one per image,
                  in [0, 6] with relu6, the paper's activation

With several sources the names of taps include the source, as in
"imagenet/stage1_block3".

Source: Jang, Lee, Hwang and Shin, "Learning What and Where to Transfer",
ICML 2019 (arXiv 1905.05901), sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import NamedTuple
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import types
from l2t_jax.method import pair_sets

# The activation that turns the outputs of g for all pairs, [P, B], into λ. The
# paper's is relu6, written as a clamp because the derivative of `jax.nn.relu6`
# compares floats for equality, which XLA's fusions can break; see
# `models.layers.max_pool`. With softmax pairs compete: the mean of λ over the
# pairs is 1.
PAIR_ACTIVATIONS: dict[str, Callable[[chex.Array], chex.Array]] = {
  "relu6": lambda x: jax.lax.clamp(0.0, x, 6.0),
  "relu": jax.nn.relu,
  "softplus": jax.nn.softplus,
  "softmax": lambda x: len(x) * jax.nn.softmax(x, axis=0),
}


class SourceMaps(NamedTuple):
  """Features of the sources for losses on pairs; not differentiated."""

  # n -> [B, H, W, ΣC_m]: the source maps of n's pairs, resized to n's map and
  # concatenated in the order of the pairs.
  maps: dict[str, jax.Array]
  pooled: dict[str, jax.Array]  # m -> [B, C_m], mean over positions.
  # m -> [B, H_m, W_m], mean over channels of squares, at the source's size.
  energies: dict[str, jax.Array]


class TransferWeights(NamedTuple):
  """What and where to transfer for each image of a batch."""

  channel: dict[str, jax.Array]  # pair -> [B, C_m], w; rows sum to 1.
  pair: dict[str, jax.Array]  # pair -> [B], λ.


class TransferMap(NamedTuple):
  """What and where to transfer, the same for all images."""

  channel: Mapping[str, chex.Array]  # pair -> [C_m], w; sums to 1.
  pair: Mapping[str, float]  # pair -> λ.


def init_regressors(
  key: chex.PRNGKey,
  pairs: Sequence[pair_sets.Pair],
  source_taps: pair_sets.TapShapes,
  target_taps: pair_sets.TapShapes,
) -> dict[str, types.PyTree]:
  """Initialise r: a kernel [C_n, C_m] and a bias [C_m] per pair.

  Both are uniform within ±1/sqrt(C_n), PyTorch's default for a convolution. The
  values of a pair do not depend on the other pairs.

  Args:
    key: PRNG key; consumed.
    pairs: the set C.
    source_taps: shapes of the source's taps.
    target_taps: shapes of the target's taps.

  Returns:
    pair -> {kernel, bias}.
  """
  return {
    pair.name: torch_linear(
      _pair_key(key, pair),
      target_taps[pair.target][-1],
      source_taps[pair.source][-1],
    )
    for pair in pairs
  }


def init_meta_params(
  key: chex.PRNGKey,
  pairs: Sequence[pair_sets.Pair],
  source_taps: pair_sets.TapShapes,
  *,
  learn_channels: bool,
  learn_pairs: bool,
) -> dict[str, types.PyTree]:
  """Initialise the meta-networks f ("channel") and g ("pair").

  f starts at zero, so that w is uniform. As in the authors' code, g's kernel is
  uniform within ±1/sqrt(C_m) and its bias is 1: λ starts near 1 only if the
  pooled features are much smaller than 1, and otherwise at random values.

  Args:
    key: PRNG key; consumed.
    pairs: the set C.
    source_taps: shapes of the source's taps.
    learn_channels: whether f is learned.
    learn_pairs: whether g is learned.

  Returns:
    {"channel": {pair: {kernel [C_m, C_m], bias [C_m]}},
     "pair": {pair: {kernel [C_m, 1], bias [1]}}}, without the meta-networks
    that are not learned.
  """
  meta_params: dict[str, types.PyTree] = {}
  if learn_channels:
    meta_params["channel"] = {
      pair.name: {
        "kernel": jnp.zeros((source_taps[pair.source][-1],) * 2),
        "bias": jnp.zeros((source_taps[pair.source][-1],)),
      }
      for pair in pairs
    }
  if learn_pairs:
    meta_params["pair"] = {
      pair.name: torch_linear(
        _pair_key(key, pair), source_taps[pair.source][-1], 1
      )
      | {"bias": jnp.ones((1,))}
      for pair in pairs
    }
  return meta_params


def largest_pair_weight(activation: str, num_pairs: int) -> float:
  """Return the upper bound of λ, or inf.

  Args:
    activation: a key of `PAIR_ACTIVATIONS`.
    num_pairs: P.
  """
  return {"relu6": 6.0, "softmax": float(num_pairs)}.get(activation, np.inf)


def prepare_source(
  features: Mapping[str, chex.Array],
  pairs: Sequence[pair_sets.Pair],
  target_taps: pair_sets.TapShapes,
) -> SourceMaps:
  """Resize the source's maps to the target's, once per pair of resolutions.

  As in the authors' code, resizing is bilinear with half-pixel centres and
  without antialiasing. The result carries a `stop_gradient`.

  Args:
    features: source tap -> [B, H, W, C_m].
    pairs: the set C.
    target_taps: shapes of the target's taps.
  """
  features = {
    pair.source: at_least_float32(features[pair.source]) for pair in pairs
  }
  chex.assert_rank(list(features.values()), 4)

  # Pairs with the same source tap and resolution share one resized map.
  @functools.cache
  def resize(source, height, width):
    num_images, *_, channels = features[source].shape
    return jax.image.resize(
      features[source],
      (num_images, height, width, channels),
      method="bilinear",
      antialias=False,
    )

  @functools.cache
  def stack(sources, height, width):
    maps = [resize(source, height, width) for source in sources]
    return jnp.concatenate(maps, axis=-1)

  maps = {
    target: stack(
      tuple(pair.source for pair in group), *target_taps[target][:2]
    )
    for target, group in pair_sets.by_target(pairs).items()
  }
  pooled = {name: x.mean(axis=(1, 2)) for name, x in features.items()}
  energies = {name: energy(x) for name, x in features.items()}
  return jax.lax.stop_gradient(SourceMaps(maps, pooled, energies))


def mean_over_positions(features: chex.Array) -> jax.Array:
  """Return the mean over positions, [B, C], in float32 or more."""
  chex.assert_rank(features, 4)
  return jnp.mean(at_least_float32(features), axis=(1, 2))


def energy(features: chex.Array) -> jax.Array:
  """Return the mean over channels of squares, [B, H, W], in float32 or more."""
  chex.assert_rank(features, 4)
  return jnp.mean(jnp.square(at_least_float32(features)), axis=-1)


def source_map(
  source_maps: SourceMaps, pair: pair_sets.Pair, pairs: Sequence[pair_sets.Pair]
) -> chex.Array:
  """Return a pair's source map [B, H, W, C_m], at the target tap's size."""
  group = pair_sets.by_target(pairs)[pair.target]
  widths = [source_maps.pooled[other.source].shape[-1] for other in group]
  start = sum(widths[: group.index(pair)])
  stacked = source_maps.maps[pair.target]
  return stacked[..., start : start + widths[group.index(pair)]]


def transfer_weights(
  meta_params: types.PyTree,
  pooled: Mapping[str, chex.Array],
  pairs: Sequence[pair_sets.Pair],
  *,
  activation: str = "relu6",
) -> TransferWeights:
  """Compute what and where to transfer.

      w^{m,n} = softmax(f^{m,n}(pool S^m(x))),  λ^{m,n} = relu6(g^{m,n}(...))

  If `meta_params` lacks f, w is uniform (1/C_m); if it lacks g, λ is 1. Without
  both this is fixed feature matching. Differentiable in `meta_params`.

  Args:
    meta_params: from `init_meta_params`.
    pooled: source tap -> [B, C_m], its mean over positions.
    pairs: the set C.
    activation: activation of g's output, a key of `PAIR_ACTIVATIONS`.
  """
  channel, scores = {}, {}
  for pair in pairs:
    x = pooled[pair.source]
    if "channel" in meta_params:
      logits = linear(meta_params["channel"][pair.name], x)
      channel[pair.name] = jax.nn.softmax(logits, axis=-1)
    else:
      channel[pair.name] = jnp.full_like(x, 1.0 / x.shape[-1])
    if "pair" in meta_params:
      scores[pair.name] = linear(meta_params["pair"][pair.name], x)[:, 0]
    else:
      scores[pair.name] = jnp.ones_like(x[:, 0])
  if "pair" in meta_params:
    together = PAIR_ACTIVATIONS[activation](jnp.stack(list(scores.values())))
    scores = dict(zip(scores, together, strict=True))
  return TransferWeights(channel, scores)


def repeat_map(
  transfer_map: TransferMap, pooled: Mapping[str, chex.Array]
) -> TransferWeights:
  """Give every image of a batch the weights of one map.

  Args:
    transfer_map: w [C_m] and λ of each pair.
    pooled: source tap -> [B, C_m]; gives the number of images.
  """
  like = next(iter(pooled.values()))
  num_images = len(like)
  repeat = lambda x: jnp.broadcast_to(
    jnp.asarray(x, like.dtype), (num_images, *jnp.shape(x))
  )
  return TransferWeights(
    jax.tree.map(repeat, transfer_map.channel),
    jax.tree.map(repeat, transfer_map.pair),
  )


def channel_distances(
  regressors: types.PyTree,
  target_features: Mapping[str, chex.Array],
  source_maps: SourceMaps,
  pairs: Sequence[pair_sets.Pair],
) -> dict[str, chex.Array]:
  """Compute the distance between source and target for each channel.

      d^{m,n}_c = mean over positions of (S^m - r^{m,n}(T^n))²_c

  Args:
    regressors: from `init_regressors`.
    target_features: target tap -> [B, H, W, C_n].
    source_maps: from `prepare_source`.
    pairs: the set C.

  Returns:
    pair -> d [B, C_m].
  """
  distances: dict[str, jax.Array] = {}
  for target, group in pair_sets.by_target(pairs).items():
    wanted = source_maps.maps[target]
    # One matrix product for all regressors of a tap.
    layers = [regressors[pair.name] for pair in group]
    together = jax.tree.map(
      lambda *parts: jnp.concatenate(parts, axis=-1), *layers
    )
    regressed = _linear_by_image(
      together, target_features[target].astype(wanted.dtype)
    )
    chex.assert_equal_shape([wanted, regressed])
    distance = jnp.mean(jnp.square(wanted - regressed), axis=(1, 2))
    ends = np.cumsum([layer["bias"].size for layer in layers])
    parts = jnp.split(distance, ends[:-1], axis=-1)
    distances |= zip((pair.name for pair in group), parts, strict=True)
  return {pair.name: distances[pair.name] for pair in pairs}


def matching_loss(
  distances: Mapping[str, chex.Array],
  weights: TransferWeights,
  *,
  beta: float,
) -> chex.Array:
  """Compute the weighted feature-matching loss.

      L_wfm = β Σ_(m,n) mean over the batch of λ^{m,n} Σ_c w^{m,n}_c d^{m,n}_c

  Differentiable in `distances` and `weights`.

  Args:
    distances: pair -> d [B, C_m].
    weights: w and λ for the same images.
    beta: β, weight of the matching loss.

  Returns:
    The loss, [].
  """
  losses = []
  for name, distance in distances.items():
    channel, pair_weight = weights.channel[name], weights.pair[name]
    chex.assert_equal_shape([distance, channel])
    chex.assert_shape(pair_weight, distance.shape[:1])
    losses.append(jnp.mean(pair_weight * jnp.sum(channel * distance, axis=-1)))
  return beta * jnp.sum(jnp.stack(losses))


def linear(layer: Mapping[str, chex.Array], x: chex.Array) -> chex.Array:
  """Apply {kernel [I, O], bias [O]} to x [..., I]."""
  return jnp.einsum("...i,io->...o", x, layer["kernel"]) + layer["bias"]


def _linear_by_image(layer, x):
  """Apply `linear` to [B, H, W, I], with a fast derivative in the kernel.

  That derivative is a sum over all positions of all images. If an image has
  more positions than channels, each image is summed on its own first: on CPU
  this is two to three times faster than a single deep product.
  """
  num_images, height, width, channels = x.shape
  if height * width <= channels:
    return linear(layer, x)
  kernel = jnp.broadcast_to(
    layer["kernel"], (num_images, *layer["kernel"].shape)
  )
  y = jnp.einsum("bpi,bio->bpo", x.reshape(num_images, -1, channels), kernel)
  return y.reshape(num_images, height, width, -1) + layer["bias"]


@functools.partial(jax.jit, static_argnames=("fan_in", "fan_out"))
def torch_linear(
  key: chex.PRNGKey, fan_in: int, fan_out: int
) -> dict[str, jax.Array]:
  """Initialise {kernel [I, O], bias [O]}, uniform within ±1/sqrt(I).

  Args:
    key: PRNG key; consumed.
    fan_in: I.
    fan_out: O.
  """
  kernel_key, bias_key = jax.random.split(key)
  bound = fan_in**-0.5
  return {
    "kernel": jax.random.uniform(
      kernel_key, (fan_in, fan_out), minval=-bound, maxval=bound
    ),
    "bias": jax.random.uniform(
      bias_key, (fan_out,), minval=-bound, maxval=bound
    ),
  }


def _pair_key(key, pair):
  # A CRC, because Python's hash of a string differs between processes.
  return jax.random.fold_in(key, zlib.crc32(pair.name.encode()))


def at_least_float32(x: chex.Array) -> chex.Array:
  """Convert bfloat16 features and outputs to float32, for the losses."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
