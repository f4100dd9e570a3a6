"""Attention-based feature distillation: pair weights without a look-ahead.

For each source tap m, attention over the target taps n of its pairs decides how
strongly each of them imitates the source's attention map:

  α^{m,·}(x) = softmax over n of (q_m(x) · k_{m,n}(x) + p_m · p_n) / √d
  L_AFD = Σ_m mean over the batch of Σ_n α^{m,n} d^{m,n}
  d^{m,n} = mean over positions of (Q(S^m) - Q(T^n))²

The query q_m is computed from the mean of S^m over positions, the keys k_{m,n}
from that of T^n, both by linear layers with batch normalisation. p are learned
position embeddings, and Q is `loss_functions.attention_map`, with T^n pooled to
the size of S^m. All parameters are trained together with the target, by the
same loss.

Ji, Heo and Park, "Show, Attend and Distill: Knowledge Distillation via
Attention-based Feature Matching", AAAI 2021 (arXiv 2102.02973), as in the
authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import types
from l2t_jax.method import loss_functions, pair_sets, transfer


def init(
  key: chex.PRNGKey,
  pairs: Sequence[pair_sets.Pair],
  source_taps: pair_sets.TapShapes,
  target_taps: pair_sets.TapShapes,
  *,
  dim: int,
) -> dict[str, types.PyTree]:
  """Initialise the parameters of the attention, as PyTorch does.

  Args:
    key: PRNG key; consumed.
    pairs: the pairs that attention weighs.
    source_taps: shapes of the source's taps, in pairs.
    target_taps: shapes of the target's taps, in pairs.
    dim: d, the dimension of queries and keys.

  Returns:
    {"query": {m: layer}, "key": {n: layer}, "bilinear": {m: layer},
     "source_position": {m: [d]}, "target_position": {n: [d]}}; a layer is
    {kernel [I, d], bias [d], scale [d], shift [d]}.
  """
  sources = list(dict.fromkeys(pair.source for pair in pairs))
  targets = list(dict.fromkeys(pair.target for pair in pairs))
  keys = iter(jax.random.split(key, 2 * len(sources) + len(targets) + 2))

  def layer(num_in):
    return transfer.torch_linear(next(keys), num_in, dim) | {
      "scale": jnp.ones(dim),
      "shift": jnp.zeros(dim),
    }

  def positions(names):
    # Xavier-normal initialisation.
    scale = np.sqrt(2 / (len(names) + dim))
    rows = scale * jax.random.normal(next(keys), (len(names), dim))
    return dict(zip(names, rows, strict=True))

  return {
    "query": {m: layer(source_taps[m][-1]) for m in sources},
    "key": {n: layer(target_taps[n][-1]) for n in targets},
    "bilinear": {m: layer(dim) for m in sources},
    "source_position": positions(sources),
    "target_position": positions(targets),
  }


def attention(
  params: Mapping[str, types.PyTree],
  source_pooled: Mapping[str, chex.Array],
  target_features: Mapping[str, chex.Array],
  pairs: Sequence[pair_sets.Pair],
) -> dict[str, jax.Array]:
  """Compute α, pair -> [B]; it sums to 1 over the pairs of a source tap.

  Differentiable in params and target_features.

  Args:
    params: from `init`.
    source_pooled: m -> [B, C_m], the means over positions of S^m.
    target_features: n -> [B, H, W, C_n].
    pairs: as in `init`.
  """
  queries = {
    m: _normalised(layer, source_pooled[m][:, None])[:, 0]
    for m, layer in params["query"].items()
  }
  keys = {
    n: jax.nn.relu(
      _normalised(
        layer, transfer.mean_over_positions(target_features[n])[:, None]
      )[:, 0]
    )
    for n, layer in params["key"].items()
  }
  # The keys of all target taps are normalised together, as a larger batch.
  stacked = jnp.stack(list(keys.values()), axis=1)
  weights: dict[str, jax.Array] = {}
  for m, query in queries.items():
    group = [pair for pair in pairs if pair.source == m]
    transformed = _normalised(params["bilinear"][m], stacked)
    of_target = dict(zip(keys, jnp.moveaxis(transformed, 1, 0), strict=True))
    scores = [
      jnp.sum(query * of_target[pair.target], axis=-1)
      + params["source_position"][m] @ params["target_position"][pair.target]
      for pair in group
    ]
    shares = jax.nn.softmax(
      jnp.stack(scores) / np.sqrt(query.shape[-1]), axis=0
    )
    weights |= zip((pair.name for pair in group), shares, strict=True)
  return {pair.name: weights[pair.name] for pair in pairs}


def distances(
  source_energies: Mapping[str, chex.Array],
  target_features: Mapping[str, chex.Array],
  pairs: Sequence[pair_sets.Pair],
) -> dict[str, jax.Array]:
  """Compute d, pair -> [B]; differentiable in target_features.

  Args:
    source_energies: m -> [B, H_m, W_m], the means over channels of (S^m)².
    target_features: n -> [B, H, W, C_n].
    pairs: the pairs to compare.
  """
  energies = {
    pair.target: transfer.energy(target_features[pair.target]) for pair in pairs
  }

  def distance(pair):
    wanted = source_energies[pair.source]
    pooled = adaptive_mean(energies[pair.target], wanted.shape[1:])
    source, target = map(loss_functions.of_unit_length, (wanted, pooled))
    return jnp.mean(jnp.square(source - target), axis=-1)

  return {pair.name: distance(pair) for pair in pairs}


def adaptive_mean(maps: chex.Array, size: tuple[int, ...]) -> jax.Array:
  """Pool maps [B, H, W] to a size, as PyTorch's adaptive_avg_pool2d does."""
  chex.assert_rank(maps, 3)
  rows, columns = (
    _window_means(old, new)
    for old, new in zip(maps.shape[1:], size, strict=True)
  )
  return jnp.einsum("hy,byx,wx->bhw", rows, maps, columns)


def _window_means(old, new):
  """Return the matrix [new, old] that takes means over windows."""
  matrix = np.zeros((new, old))
  for i in range(new):
    # PyTorch's window, from floor(i * old / new) to ceil((i + 1) * old / new).
    window = slice(i * old // new, -(-(i + 1) * old // new))
    matrix[i, window] = 1 / (window.stop - window.start)
  return matrix


def _normalised(layer, x):
  """Apply a layer to [B, M, I] and normalise over the B M rows: [B, M, d]."""
  # Batch statistics alone, without running averages: only training computes
  # this loss.
  y = transfer.linear(layer, x)
  mean, var = jnp.mean(y, axis=(0, 1)), jnp.var(y, axis=(0, 1))
  return (
    layer["scale"] * (y - mean) * jax.lax.rsqrt(var + 1e-5) + layer["shift"]
  )
