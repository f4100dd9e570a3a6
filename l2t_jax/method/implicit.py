"""Differentiate an inner loop implicitly, where it ends at a stationary point.

If ∇_θ L_inner(θ*, φ) = 0 holds at the end θ* of the loop for all φ nearby, then

    dθ*/dφ = -H⁻¹ ∂²L_inner/∂θ∂φ,    H = ∂²L_inner/∂θ²,

however the loop came there: its steps are neither kept nor differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from l2t_jax import errors, types
from l2t_jax.method import bilevel

# How H u = v is solved, with one Hessian-vector product per iteration.
#   cg:      conjugate gradients; H is positive definite.
#   neumann: u = α Σ_k (I - α H)^k v; the eigenvalues of α H are in (0, 2).
#            (Lorraine, Vicol and Duvenaud, AISTATS 2020, arXiv 1911.02590.)
SOLVERS = ("cg", "neumann")


def at_stationary_point(
  look_ahead: bilevel.LookAhead,
  loss_fn: types.InnerLossFn,
  *,
  solver: str = "cg",
  tolerance: float = 1e-3,
  max_iterations: int = 100,
  damping: float = 0.0,
  scale: float = 1.0,
) -> bilevel.LookAhead:
  """Replace the derivative of a look-ahead by the implicit one.

  Only the parameters at its end have a derivative, and only with respect to the
  meta-parameters, in the backward direction. It is exact at a stationary point
  of the loss, up to the tolerance; if the loop stops earlier, it is wrong by
  about the size of the gradient that is left. What the optimizer adds to the
  loss, such as weight decay, belongs into the loss.

  The backward pass costs about two gradients of the loss per iteration of the
  solver, and as much memory as one, however many steps the look-ahead has.

  Args:
    look_ahead: `(state, meta_params, batch) -> state`; any loop that minimises
      the loss.
    loss_fn: the inner loss; its batch is that of the look-ahead.
    solver: one of `SOLVERS`.
    tolerance: largest norm of H u - v relative to that of v. Where it is not
      reached, the derivative is NaN: raise `max_iterations`, `tolerance` or
      `damping`.
    max_iterations: of the solver.
    damping: added to the eigenvalues of H; above 0 the derivative is biased.
    scale: α of the Neumann series, at most 1 over the largest eigenvalue.

  Returns:
    A look-ahead with the same results, for `bilevel.hypergradient`.

  Raises:
    errors.InputError: the solver is unknown, or a number is out of range.
  """
  if solver not in SOLVERS:
    raise errors.InputError(
      f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}"
    )
  for name, value, is_allowed in (
    ("tolerance", tolerance, tolerance > 0),
    ("max_iterations", max_iterations, max_iterations >= 1),
    ("damping", damping, damping >= 0),
  ):
    if isinstance(value, int | float) and not is_allowed:
      raise errors.InputError(
        f"{name} is {value}; the tolerance must be above 0, max_iterations at"
        " least 1, and damping 0 or more"
      )

  def solve(product, v):
    if solver == "neumann":
      return _neumann(product, v, scale, tolerance, max_iterations)
    return jax.scipy.sparse.linalg.cg(
      product, v, tol=tolerance, maxiter=max_iterations
    )[0]

  implicit = jax.custom_vjp(look_ahead)

  def forward(state, meta_params, batch):
    end = look_ahead(state, meta_params, batch)
    return end, (end.params, meta_params, end.model_state, batch)

  def backward(kept, cotangents):
    params, meta_params, model_state, batch = kept
    v = cotangents.params

    def gradient(params, meta_params):
      return jax.grad(loss_fn, has_aux=True)(
        params, meta_params, model_state, batch
      )[0]

    def product(u):
      _, along = jax.jvp(lambda p: gradient(p, meta_params), (params,), (u,))
      return jax.tree.map(lambda h, x: h + damping * x, along, u)

    u = solve(product, v)
    residual = optax.tree.norm(optax.tree.sub(product(u), v))
    is_solved = residual <= 2 * tolerance * optax.tree.norm(v)
    _, pullback = jax.vjp(lambda m: gradient(params, m), meta_params)
    (along_meta,) = pullback(u)
    slopes = jax.tree.map(
      lambda x: jnp.where(is_solved, -x, jnp.nan), along_meta
    )
    return None, slopes, None

  implicit.defvjp(forward, backward)
  return implicit


def _neumann(product, v, scale, tolerance, max_iterations):
  """Return the partial sum of α Σ_k (I - α H)^k v, of which H u is near v."""
  wanted = tolerance * optax.tree.norm(v)

  # The k-th term without α is v - H u_k, the residual of what was added before.
  def goes_on(carry):
    _, term, count = carry
    return (optax.tree.norm(term) > wanted) & (count < max_iterations)

  def add(carry):
    u, term, count = carry
    u = jax.tree.map(lambda a, b: a + scale * b, u, term)
    term = jax.tree.map(lambda a, b: a - scale * b, term, product(term))
    return u, term, count + 1

  start = (optax.tree.zeros_like(v), v, 0)
  return jax.lax.while_loop(goes_on, add, start)[0]
