"""Compare a hypergradient with central differences."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import extend
import jax.numpy as jnp
import numpy as np

from l2t_jax import errors, types
from l2t_jax.method import bilevel


class Comparison(NamedTuple):
  """A hypergradient and central differences, along the same directions."""

  leaves: tuple[str, ...]  # Path of the array that a direction varies, [n].
  derivatives: np.ndarray  # Hypergradient times direction, [n].
  differences: np.ndarray  # (L(φ + ε d) - L(φ - ε d)) / 2ε, [n].
  rounding: np.ndarray  # Rounding errors of the differences, [n].
  dtype: str  # Precision of both.
  reason: str = ""  # Why float64 was not possible; "" if it was.

  @property
  def errors(self) -> np.ndarray:
    """Relative errors [n]; infinite where a value is not finite.

    The rounding errors of the differences are subtracted first: a derivative
    that is 0 up to rounding is right, although its relative error is 1.
    """
    size = np.maximum(abs(self.derivatives), abs(self.differences))
    distance = abs(self.derivatives - self.differences)
    excess = np.maximum(distance - self.rounding, 0)
    relative = excess / np.where(size > 0, size, 1)
    return np.where(np.isfinite(distance), relative, np.inf)

  @property
  def error(self) -> float:
    """The largest of the errors."""
    return float(self.errors.max())

  def __str__(self) -> str:
    rows = zip(
      self.leaves, self.derivatives, self.differences, self.errors, strict=True
    )
    return "\n".join(
      [
        f"in {self.dtype}: directional derivative, central difference, relative"
        f" error{self.reason and f' (not in float64: {self.reason})'}",
        *(f"  {name}: {x:.6g}, {y:.6g}, {e:.1e}" for name, x, y, e in rows),
      ]
    )


def check_hypergradient(
  look_ahead: bilevel.LookAhead,
  outer_loss_fn: types.InnerLossFn,
  state: types.InnerState,
  meta_params: types.PyTree,
  batch: types.PyTree,
  *,
  forward: bool = False,
  num_directions: int = 2,
  epsilon: float | None = None,
  seed: int = 0,
) -> Comparison:
  """Compare `bilevel.hypergradient` with central differences.

  Each array of the meta-parameters is varied separately, so that the result
  shows where a derivative is wrong; this costs 2 look-aheads per direction and
  array. Everything is computed in float64 if the functions allow it, else in
  the dtypes of the arguments. A loss that draws random numbers without an
  explicit dtype gets different ones in float64: pass the dtype, or put the
  random numbers into the batch.

  Args:
    look_ahead: see `bilevel.hypergradient`, also for the next five.
    outer_loss_fn: the loss after the look-ahead.
    state: start of the look-ahead.
    meta_params: φ.
    batch: argument of the look-ahead and the outer loss.
    forward: True for forward mode.
    num_directions: random directions per array; one for an array of size 1.
    epsilon: length of the steps, relative to the root mean square of the array
      (or to 1 if that is larger); None for 1e-5 in float64 and 1e-2 otherwise.
    seed: seed of the random directions.

  Returns:
    The comparison; print it, or assert that its `error` is small. Expect less
    than 1e-5 in float64, or more near kinks such as those of relu, and less
    than 1e-2 in float32.

  Raises:
    errors.InputError: there are no directions or `epsilon` is not above 0; or
      `bilevel.hypergradient` refuses its arguments.
  """
  if num_directions < 1 or (epsilon is not None and epsilon <= 0):
    raise errors.InputError(
      f"num_directions is {num_directions} and epsilon is {epsilon}; they must"
      " be at least 1, and above 0 or None"
    )

  def compare(arguments, epsilon, *, may_cast):
    state, meta_params, batch = arguments
    loss_of = bilevel.loss_after(look_ahead, outer_loss_fn, state, batch)
    if not may_cast:
      _reject_casts(loss_of, meta_params)
    _, grads = jax.jit(
      lambda meta_params: bilevel.hypergradient(
        look_ahead, outer_loss_fn, state, meta_params, batch, forward=forward
      )
    )(meta_params)
    value = jax.jit(loss_of)
    rng = np.random.default_rng(seed)
    return _compare(value, grads, meta_params, num_directions, epsilon, rng)

  # Outside of `enable_x64`, so that integers get their usual dtype.
  arguments = jax.tree.map(jnp.asarray, (state, meta_params, batch))
  with jax.enable_x64(True):
    try:
      wide = jax.tree.map(_in_float64, arguments)
      return compare(wide, epsilon or 1e-5, may_cast=False)
    except (TypeError, ValueError) as error:  # The functions fix a dtype.
      reason = errors.first_line(error)
  comparison = compare(arguments, epsilon or 1e-2, may_cast=True)
  return comparison._replace(reason=reason)


def _reject_casts(function, argument):
  """Raise a TypeError if a function rounds float64 values of its argument."""
  traced = jax.make_jaxpr(function)(argument)
  for dtype in _casts(traced.jaxpr, ()):
    raise TypeError(f"they convert values to {dtype}")


def _casts(jaxpr, constants):
  """Yield the dtypes that float64 values other than constants are rounded to.

  Within `while` and `cond`, all values but literals count.
  """
  constants = {*constants, *jaxpr.constvars}
  is_constant = lambda x: isinstance(x, extend.core.Literal) or x in constants
  for equation in jaxpr.eqns:
    inputs = equation.invars
    if all(map(is_constant, inputs)):
      constants.update(equation.outvars)
      continue
    if equation.primitive.name == "convert_element_type":
      before, after = (x.aval.dtype for x in (inputs[0], equation.outvars[0]))
      is_float = jnp.issubdtype(after, jnp.floating)
      if before == jnp.float64 and is_float and after != before:
        yield after
    is_mapped = equation.primitive.name not in ("while", "cond")
    changing = range(0)  # The carry of a loop.
    if equation.primitive.name == "scan":
      first = equation.params["num_consts"]
      changing = range(first, first + equation.params["num_carry"])
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if isinstance(inner, extend.core.Jaxpr):
        passed = zip(inner.invars, inputs, strict=False) if is_mapped else ()
        known = {
          x
          for k, (x, y) in enumerate(passed)
          if is_constant(y) and k not in changing
        }
        yield from _casts(inner, known)


def _in_float64(leaf: jax.Array) -> jax.Array:
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  return leaf.astype(jnp.float64) if is_float else leaf


def _compare(value, grads, meta_params, num_directions, epsilon, rng):
  """Compare gradients with differences of a function of the meta-parameters."""
  paths, treedef = jax.tree.flatten_with_path(meta_params)
  slopes = jax.tree.leaves(grads)
  dtype = jnp.result_type(*(leaf for _, leaf in paths))
  precision = float(jnp.finfo(dtype).eps)
  names, derivatives, differences, rounding = [], [], [], []
  for index, (path, leaf) in enumerate(paths):
    size = max(1.0, float(jnp.sqrt(jnp.mean(jnp.square(leaf)))))
    for _ in range(num_directions if leaf.size > 1 else 1):
      direction = rng.normal(size=np.shape(leaf))
      direction /= np.linalg.norm(direction)

      def moved(length, index=index, direction=direction):
        leaves = [each for _, each in paths]
        step = jnp.asarray(length * direction, leaves[index].dtype)
        leaves[index] = leaves[index] + step
        return float(value(jax.tree.unflatten(treedef, leaves)))

      length = epsilon * size
      ahead, behind = moved(length), moved(-length)
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      names.append(name or "meta_params")
      derivatives.append(float(np.sum(slopes[index] * direction)))
      differences.append((ahead - behind) / (2 * length))
      rounding.append(precision * max(abs(ahead), abs(behind)) / length)
  return Comparison(
    tuple(names),
    np.array(derivatives),
    np.array(differences),
    np.array(rounding),
    str(dtype),
  )
