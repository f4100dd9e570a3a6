"""The common interface of networks of all libraries: pure functions."""

from __future__ import annotations

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import chex
from flax import linen as nn
from flax import nnx
import jax

from l2t_jax import errors, types

# Argument that sets the mode of a module -> its value in train mode.
_TRAIN_ARGUMENTS = {
  "train": True,
  "training": True,
  "is_train": True,
  "is_training": True,
  "inference": False,
  "deterministic": False,
  "use_running_average": False,
}
HOW_TO_TELL = (
  "let its __call__ have one of the arguments"
  f" {', '.join(_TRAIN_ARGUMENTS)}; a module of NNX may follow .train() and"
  " .eval() instead"
)
CHANGES_IN_EVAL = (
  "the network also changes its state, or draws random numbers, in eval mode;"
  f" {HOW_TO_TELL}"
)


class Functions(NamedTuple):
  """A network given as two pure functions.

  Params and model state are nested dicts of plain arrays with strings as keys.
  A network without a state may return None for it; its `apply` then gets {}.
  """

  # key -> (params, model_state).
  init: Callable[[chex.PRNGKey], tuple[types.PyTree, types.PyTree]]
  # (params, model_state, images, *, train) -> (logits, features, model_state).
  apply: types.ApplyFn
  # Taps to use where none are named; () to let `models.select_taps` choose.
  default_taps: tuple[str, ...] = ()
  # Hash of an exported program, which its Python code does not identify.
  digest: str = ""
  # (model_state, integer) -> model_state with other PRNG keys; None if it has
  # no keys.
  fold_in: Callable[[types.PyTree, Any], types.PyTree] | None = None


Network = nn.Module | nnx.Module | Callable[[nnx.Rngs], nnx.Module] | Functions


class PureNetwork(NamedTuple):
  """A network of any library as pure functions."""

  # (key, images) -> (params, model_state).
  init: Callable[[chex.PRNGKey, jax.Array], tuple[types.PyTree, types.PyTree]]
  # (params, model_state, images, train, taps) -> (output, outputs of
  # submodules by path, model_state). With taps None all outputs are returned.
  # In eval mode, the model_state only shows whether the network changes it.
  apply: Callable[..., tuple[Any, dict[str, Any], types.PyTree]]
  # model_state -> the batch statistics that training updates (no PRNG keys).
  statistics: Callable[[types.PyTree], types.PyTree]
  # (model_state, integer) -> model_state with other PRNG keys.
  fold_in: Callable[[types.PyTree, Any], types.PyTree]
  # model_state -> the part that eval mode must not change; empty if the library
  # sees to that.
  constant: Callable[[types.PyTree], types.PyTree] = lambda model_state: {}


def from_functions(functions: Functions) -> PureNetwork:
  """Convert `Functions`."""
  # A network without state may return None; the model state must be a dict.
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

  keep = lambda model_state, number: model_state
  return PureNetwork(
    init, apply, lambda model_state: {}, functions.fold_in or keep
  )


def check_variables(name: str, tree: types.PyTree) -> None:
  """Raise `errors.InputError` if a variable cannot be saved to a file."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    # Weight files join the keys with "/".
    keys = [getattr(entry, "key", None) for entry in path]  # None in a tuple.
    is_named = keys and all(isinstance(k, str) and "/" not in k for k in keys)
    is_number = isinstance(leaf, int | float)
    is_array = hasattr(leaf, "dtype") and not is_key(leaf)
    if not (is_named and (is_number or is_array)):
      raise errors.InputError(
        f"the network's {name}{jax.tree_util.keystr(path)} cannot be saved:"
        " params and model state must be nested dicts of plain arrays, with"
        " strings without '/' as keys; store a PRNG key as"
        " jax.random.key_data(key)"
      )


def mode_arguments(call: Callable[..., Any], train: bool) -> dict[str, Any]:
  """Return the keyword arguments that put a module in train or eval mode.

  Args:
    call: `__call__` of a module, without self.
    train: whether to use train mode.

  Raises:
    errors.InputError: `call` requires a further argument besides the images.
  """
  names = inspect.signature(call).parameters
  needed = [
    name
    for name, parameter in names.items()
    if parameter.default is parameter.empty
    and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
  ]
  for name in needed[1:]:
    if name not in _TRAIN_ARGUMENTS:
      raise errors.InputError(
        f"the network's __call__ needs the argument {name!r}, besides images;"
        " give it a default, or, if it says whether the network trains, one of"
        f" the names {', '.join(_TRAIN_ARGUMENTS)}"
      )
  return {
    name: train == when_training
    for name, when_training in _TRAIN_ARGUMENTS.items()
    if name in names
  }


def is_key(x: Any) -> bool:
  """Return whether an array consists of typed PRNG keys."""
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def name_outputs(outputs: dict[tuple[Any, ...], Any]) -> dict[str, Any]:
  """Name the outputs of submodules by their paths.

  Args:
    outputs: (module, submodule, ..., method) -> outputs of its calls.

  Returns:
    "module/submodule" -> output of its first call of `__call__`, and
    "module/submodule#1" and so on -> outputs of further calls. Tuples are
    replaced by their first element.
  """
  first = lambda x: x[0] if isinstance(x, tuple) and x else x
  return {
    "/".join(map(str, path)) + (f"#{i}" if i else ""): first(output)
    for (*path, method), calls in outputs.items()
    if method == "__call__" and path
    for i, output in enumerate(calls)
  }
