"""How far truncated and implicit derivatives are from exact ones."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich import console, table

from benchmarks import inner_loop_problem as problems
import l2t_jax as l2t
from l2t_jax.method import implicit

_TOLERANCES = tuple(10.0**-k for k in range(1, 9))


class Implicit(NamedTuple):
  """How far an implicit derivative is from the exact one."""

  solver: str
  tolerance: float
  error: float  # Relative.
  products: int  # With the Hessian.


def measure(problem: problems.Problem, num_steps: int) -> dict[str, Any]:
  """Compute all errors and print them; JAX has float64 enabled."""
  results = {
    "truncation": truncation_errors(problem, num_steps),
    "implicit": [one._asdict() for one in implicit_errors(problem.batch)],
  }
  _print(results)
  return results


def truncation_errors(
  problem: problems.Problem, num_steps: int
) -> dict[int, float]:
  """Return K -> error, if the last K of the steps are differentiated."""
  exact = problems.gradient_in_double(problem, num_steps)
  gradient = functools.partial(problems.gradient_in_double, problem, num_steps)
  counts = [2**k for k in range(num_steps.bit_length())]
  return {
    count: problems.relative_error(gradient(differentiated_steps=count), exact)
    for count in counts
  }


def implicit_errors(batch: tuple[jax.Array, ...]) -> list[Implicit]:
  """Return the errors of implicit derivatives by solver and tolerance.

  The problem is a softmax regression with a learned L2 penalty per pixel, at
  its minimum. Differentiating one Newton step from there is exact.
  """
  penalties = jnp.full(64, math.log(1e-2))
  params = jnp.zeros((64, 10))
  for _ in range(20):
    params = _newton_step(params, penalties, batch)
  state = l2t.InnerState(params, None, None)
  scale = 1 / jnp.linalg.eigvalsh(_hessian(params, penalties, batch))[-1]
  products: list[None] = []

  def counted_loss(*args):
    jax.debug.callback(lambda: products.append(None))
    return _regression_loss(*args)

  def gradient(look_ahead):
    return l2t.hypergradient(
      look_ahead, _held_out_regression_loss, state, penalties, batch
    )[1]

  @functools.partial(jax.jit, static_argnums=0)
  def implicit_gradient(solver, tolerance):
    look_ahead = l2t.at_stationary_point(
      lambda state, *_: state,
      counted_loss,
      solver=solver,
      tolerance=tolerance,
      max_iterations=100_000,
      scale=scale,
    )
    return gradient(look_ahead)

  exact = gradient(
    lambda state, *args: state._replace(params=_newton_step(params, *args))
  )
  found = []
  for solver, tolerance in itertools.product(implicit.SOLVERS, _TOLERANCES):
    products.clear()
    error = problems.relative_error(implicit_gradient(solver, tolerance), exact)
    jax.effects_barrier()
    # The last evaluation is for the product with the mixed derivative.
    found.append(Implicit(solver, tolerance, error, len(products) - 1))
  return found


def _regression_loss(params, penalties, model_state, batch):
  x, y, *_ = batch
  penalty = jnp.sum(jnp.exp(penalties)[:, None] * params**2)
  return jnp.mean(
    problems.cross_entropies(x @ params, y)
  ) + penalty, model_state


def _held_out_regression_loss(params, penalties, model_state, batch):
  *_, x, y = batch
  return jnp.mean(problems.cross_entropies(x @ params, y)), model_state


@jax.jit
def _newton_step(params, penalties, batch):
  grads, _ = jax.grad(_regression_loss, has_aux=True)(
    params, penalties, None, batch
  )
  step = jnp.linalg.solve(_hessian(params, penalties, batch), grads.ravel())
  return params - step.reshape(params.shape)


def _hessian(params, penalties, batch):
  blocks, _ = jax.hessian(_regression_loss, has_aux=True)(
    params, penalties, None, batch
  )
  return blocks.reshape(params.size, params.size)


def _print(results):
  rows = table.Table("derivative", "error", "Hessian products")
  for count, error in results["truncation"].items():
    rows.add_row(f"of the last {count} steps", f"{error:.1e}")
  for one in results["implicit"]:
    name = f"{one['solver']}, tolerance {one['tolerance']:.0e}"
    rows.add_row(name, f"{one['error']:.1e}", str(one["products"]))
  console.Console(width=140).print(rows)


def draw(results: dict[str, Any], axes: Any) -> None:
  """Draw what `measure` has returned on two axes."""
  _draw_truncation(results["truncation"], axes[0])
  _draw_implicit(results["implicit"], axes[1])


def set_ticks(axis: Any, values: Any) -> None:
  """Label the values alone."""
  axis.set_xticks(values, values)
  axis.minorticks_off()


def _draw_truncation(errors, axis):
  counts, values = zip(*errors.items(), strict=True)
  axis.semilogx(
    counts, values, "o-", color="tab:blue", markersize=4, clip_on=False
  )
  set_ticks(axis, counts)
  axis.set(
    title="derivative of the last K steps",
    xlabel=f"K of {counts[-1]} steps (mlp)",
    ylabel="relative error",
    ylim=(0, 1.05),
  )


def _draw_implicit(found, axis):
  for solver, line in zip(implicit.SOLVERS, ("o-", "s--"), strict=True):
    ones = [one for one in found if one["solver"] == solver]
    first, *_, last = (one["products"] for one in ones)
    axis.loglog(
      [one["tolerance"] for one in ones],
      [one["error"] for one in ones],
      line,
      color="tab:blue",
      markersize=4,
      label=f"{solver}: {first} to {last}",
    )
  axis.invert_xaxis()
  axis.legend(frameon=False, loc="lower left", title="Hessian products")
  axis.set(
    title="implicit derivative",
    xlabel="tolerance (softmax regression)",
    ylabel="relative error",
  )
