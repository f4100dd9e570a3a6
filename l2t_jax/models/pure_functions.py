"""What networks of all libraries have in common as pure functions."""

from __future__ import annotations

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import chex
from flax import linen as nn
from flax import nnx
import jax

from l2t_jax import errors, types

# Arguments of a module that say whether it trains, and what says that it does.
_MODES = {
  "train": True,
  "training": True,
  "is_training": True,
  "deterministic": False,
  "use_running_average": False,
}
SAY_IT = (
  f"let its __call__ have one of the arguments {', '.join(_MODES)}; a module of"
  " NNX may follow .train() and .eval() instead"
)


class Functions(NamedTuple):
  """A network by hand.

  Params and model state are nested dicts of plain arrays, their keys strings.
  Without a state it may return None for it, and is handed {}.
  """

  # key -> (params, model_state).
  init: Callable[[chex.PRNGKey], tuple[types.PyTree, types.PyTree]]
  # (params, model_state, images, *, train) -> (logits, features, model_state).
  apply: types.ApplyFn


Network = nn.Module | nnx.Module | Callable[[nnx.Rngs], nnx.Module] | Functions


class Pure(NamedTuple):
  """What the libraries have in common."""

  # (key, images) -> (params, model_state).
  init: Callable[[chex.PRNGKey, jax.Array], tuple[types.PyTree, types.PyTree]]
  # (params, model_state, images, train, taps) -> (output, outputs of
  # submodules by path, model_state); taps None: of all submodules.
  apply: Callable[..., tuple[Any, dict[str, Any], types.PyTree]]
  # model_state -> the batch statistics that training updates (no PRNG keys).
  statistics: Callable[[types.PyTree], types.PyTree]


def check_variables(name, tree):
  """Make sure that files can name every array, and hold it."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    keys = [getattr(entry, "key", None) for entry in path]  # None in a tuple.
    is_named = keys and all(isinstance(k, str) and "/" not in k for k in keys)
    is_number = isinstance(leaf, int | float)
    is_array = hasattr(leaf, "dtype") and not is_key(leaf)
    if not (is_named and (is_number or is_array)):
      raise errors.InputError(
        f"the network's {name}{jax.tree_util.keystr(path)} cannot be saved:"
        " params and model state must be nested dicts of plain arrays, with"
        " strings without '/' as keys; of a random key, keep"
        " jax.random.key_data(key)"
      )


def mode(call, train):
  """Keyword arguments that tell a module whether it trains."""
  names = inspect.signature(call).parameters
  return {
    name: train == when_training
    for name, when_training in _MODES.items()
    if name in names
  }


def pure(functions):
  or_empty = lambda tree: tree if jax.tree.leaves(tree) else {}

  def init(key, images):
    del images
    params, model_state = functions.init(key)
    return or_empty(params), or_empty(model_state)

  def apply(params, model_state, images, train, taps):
    del taps
    logits, features, model_state = functions.apply(
      params, model_state, images, train=train
    )
    return (logits, features), {}, or_empty(model_state)

  return Pure(init, apply, lambda model_state: {})


def is_key(x):
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def by_path(outputs):
  """{(module, ..., "__call__"): outputs of its calls} -> {name: output}."""
  return {
    "/".join(map(str, path)) + (f"#{i}" if i else ""): output
    for (*path, method), calls in outputs.items()
    if method == "__call__" and path
    for i, output in enumerate(calls)
  }
