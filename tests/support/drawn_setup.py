"""Whole iterations with drawn shapes, pairs, T and optimizers."""

import functools
from typing import NamedTuple

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2t_jax import types
from l2t_jax.method import objectives, optimizers, pair_sets, training, transfer

NUM_CLASSES = 3
META_OPTIMIZER = optimizers.adam_l2(1e-3, 1e-4)
OPTIMIZERS = {
  "paper": optimizers.sgd(momentum=0.9, weight_decay=1e-4),
  "plain": lambda rate: optax.sgd(rate),
  "decayed": optimizers.sgd(momentum=0.0, weight_decay=1e-2),
  "nesterov": lambda rate: optax.chain(
    optax.add_decayed_weights(1e-3),
    optax.sgd(rate, momentum=0.9, nesterov=True),
  ),
  # Their first step is by the sign of the gradient, but for eps.
  "adam": lambda rate: optax.adam(rate / 10, eps=1e-3, eps_root=1e-6),
  "adamw": lambda rate: optax.adamw(rate / 10, eps=1e-3, eps_root=1e-6),
}


class Drawn(NamedTuple):
  """What an example is made of."""

  batch_size: int
  resolution: int  # Of the images, in pixels.
  image_channels: int
  source_widths: tuple[int, ...]  # Of the taps, from shallow to deep.
  target_widths: tuple[int, ...]
  pair_set: str
  num_inner_steps: int  # T.
  rolled: bool
  look_ahead_loss: str
  optimizer: str
  seed: int


def examples(
  *,
  resolutions=(4, 5, 6),
  num_source_taps=(1, 2),
  num_target_taps=(1, 2),
  pair_sets=("all_to_all", "nearest", "one_to_one", "single"),
  num_inner_steps=(2, 1, 3),
):
  """Draw a `Drawn`.

  The first of each tuple is what the first example is made of: hypothesis
  begins with it, and it is to be no degenerate one.
  """

  def widths(sizes):
    width = st.sampled_from((2, 3, 1, 4))
    at_least, at_most = sizes
    return st.lists(width, min_size=at_least, max_size=at_most).map(tuple)

  return st.builds(
    Drawn,
    batch_size=st.sampled_from((3, 4, 5, 1, 2)),
    resolution=st.sampled_from(resolutions),
    image_channels=st.sampled_from((3, 1)),
    source_widths=widths(num_source_taps),
    target_widths=widths(num_target_taps),
    pair_set=st.sampled_from(pair_sets),
    num_inner_steps=st.sampled_from(num_inner_steps),
    rolled=st.booleans(),
    look_ahead_loss=st.sampled_from(training.LOOK_AHEAD_LOSSES),
    optimizer=st.sampled_from(tuple(OPTIMIZERS)),
    seed=st.integers(0, 2**16),
  )


class Problem:
  """An example's networks, states, batch and steps, in the precision now."""

  def __init__(self, drawn, pairs=None):
    self.drawn = drawn
    keys = jax.random.split(jax.random.key(drawn.seed), 4)
    side, channels = drawn.resolution, drawn.image_channels
    self.source_taps = _taps(side, drawn.source_widths)
    self.target_taps = _taps(side, drawn.target_widths)
    self.pairs = pairs or pair_sets.make_pairs(
      drawn.pair_set, self.source_taps, self.target_taps
    )
    source, self._target_variables = (
      _init(key, (channels, *widths))
      for key, widths in zip(
        keys[:2], (drawn.source_widths, drawn.target_widths), strict=True
      )
    )
    self.sources = {"": training.Variables(*source)}
    self._keys = keys[2:]
    rng = np.random.default_rng(drawn.seed)
    self.batch = types.Batch(
      jnp.asarray(
        rng.standard_normal((drawn.batch_size, side, side, channels))
      ),
      jnp.asarray(rng.integers(0, NUM_CLASSES, drawn.batch_size)),
    )

  def state(self, method="l2t_ww"):
    """The first state, with meta-networks that tell channels apart."""
    method = objectives.get_method(method)
    params, model_state = self._target_variables
    params = {"target": params}
    if method.losses:
      params["regressors"] = _widen(
        transfer.init_regressors(
          self._keys[0], self.pairs, self.source_taps, self.target_taps
        )
      )
    meta_params = transfer.init_meta_params(
      self._keys[1],
      self.pairs,
      self.source_taps,
      learn_channels=method.learn_channels,
      learn_pairs=method.learn_pairs,
    )
    return training.create_state(
      params,
      model_state,
      _widen(meta_params),
      self._recipe(),
    )

  def train_step(self, method="l2t_ww", mode="linearized", update_meta=True):
    needs_source = objectives.get_method(method).needs_source
    losses = {"matching": objectives.matching(self.pairs, beta=0.5)}
    weights_fn = functools.partial(transfer.transfer_weights, pairs=self.pairs)
    problem = training.Problem(
      objectives.make_losses(_apply, losses if needs_source else {}),
      {"": _apply} if needs_source else {},
      self.pairs if needs_source else (),
      self.target_taps,
      weights_fn if needs_source else None,
    )
    return training.make_train_step(
      problem, self._recipe(mode), update_meta=update_meta
    )

  def _recipe(self, mode="linearized"):
    return training.Recipe(
      OPTIMIZERS[self.drawn.optimizer],
      lambda step: 0.05,
      META_OPTIMIZER,
      self.drawn.num_inner_steps,
      self.drawn.look_ahead_loss,
      mode,
      self.drawn.rolled,
    )


def _taps(side, widths):
  """Shapes of a network's taps: each is half the size of the one before."""
  sides = [-(-side // 2**index) for index in range(len(widths))]
  return {
    f"tap{index}": (side, side, width)
    for index, (side, width) in enumerate(zip(sides, widths, strict=True))
  }


def _init(key, channels):
  """Return (params, model_state) of `_apply`."""
  keys = jax.random.split(key, len(channels))
  sizes = zip(channels, (*channels[1:], NUM_CLASSES), strict=True)
  *layers, head = (
    transfer.torch_linear(key, *size)
    for key, size in zip(keys, sizes, strict=True)
  )
  state = [jnp.zeros_like(layer["bias"]) for layer in layers]
  return _widen({"layers": layers, "head": head}), _widen(state)


def _apply(params, model_state, images, *, train):
  """A `types.ApplyFn`: 1x1 convolutions, centred as batch norm centres."""
  x, features, new_state = images, {}, []
  for layer, kept in zip(params["layers"], model_state, strict=True):
    x = transfer.linear(layer, x)
    mean = jnp.mean(x, axis=(0, 1, 2)) if train else kept
    new_state.append(0.9 * kept + 0.1 * jax.lax.stop_gradient(mean))
    x = jnp.tanh(3 * (x - mean))
    features[f"tap{len(features)}"] = x
    x = x[:, ::2, ::2]
  logits = transfer.linear(params["head"], jnp.mean(x, axis=(1, 2)))
  return logits, features, new_state


def _widen(tree):
  """Flax initialises in float32 also where float64 is on."""
  dtype = jnp.result_type(float)
  return jax.tree.map(lambda x: x.astype(dtype), tree)
