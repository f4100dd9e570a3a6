"""Differentiate an inner loop implicitly, where it ends at a stationary point.

If ∇_θ L_inner(θ*, φ) = 0 holds at the end θ* of the loop for all φ nearby, then

    dθ*/dφ = -H⁻¹ ∂²L_inner/∂θ∂φ,    H = ∂²L_inner/∂θ²,

no matter how the loop got there: its steps are neither stored nor
differentiated.
"""

from __future__ import annotations

import functools

import jax
from jax import custom_derivatives
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

  Only the final parameters have a derivative, only in reverse mode, and only
  with respect to the meta-parameters and the values that the loss closes over.
  At a stationary point of the loss it is exact up to the tolerance. If the loop
  stops earlier, its error is proportional to the remaining gradient and, where
  the loss is flat, many times as large. Terms that the optimizer adds, such as
  weight decay, have to be part of the loss.

  The backward pass costs about two gradients of the loss per iteration of the
  solver. It needs the memory of one gradient, however many steps the look-ahead
  has.

  Args:
    look_ahead: `(state, meta_params, batch) -> state`; any loop that minimises
      the loss. Outside of `jax.jit`, it need not be written in JAX, unless it
      closes over the meta-parameters.
    loss_fn: the inner loss, evaluated on the batch of the look-ahead. It is
      always traced: none of its arguments can decide what Python does.
    solver: one of `SOLVERS`.
    tolerance: the solver of H u = v, v = ∂L_outer/∂θ, stops when the residual
      is this small relative to the norm of v. If the residual ends at more than
      twice that, the derivative is NaN: raise `max_iterations`, `tolerance` or
      `damping`.
    max_iterations: largest number of iterations of the solver.
    damping: added to the eigenvalues of H; above 0 the derivative is biased.
    scale: α of the Neumann series, at most 1 over the largest eigenvalue of H.

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

  def implicit(state, meta_params, batch):
    # The loop is not differentiated.
    start = jax.lax.stop_gradient((state, meta_params, batch))
    end = jax.lax.stop_gradient(bilevel.run_look_ahead(look_ahead, *start))
    args = (end.params, meta_params, end.model_state, start[2])
    loss_of, closed_over = bilevel.opened(loss_fn, *args)

    @jax.custom_vjp
    def rule(closed_over, params, *others):
      return params

    def forward(*primals):
      values = custom_derivatives.custom_vjp_primal_tree_values(primals)
      _, rest = bilevel.arguments_of(primals)
      # Not the argument, which is a constant in second derivatives.
      params = rule(*values)
      return params, (params, rest)

    def backward(kept, cotangents):
      params, (meta_params, differentiated, *constants) = kept
      v = jax.tree.map(bilevel.as_array, cotangents)

      def gradient(params, meta_params, differentiated):
        rest = (meta_params, differentiated, *constants)
        (grads, *_), _ = bilevel.joint_gradient(loss_of)(params, rest)
        return grads

      def product(u):
        _, along = jax.jvp(
          lambda params: gradient(params, meta_params, differentiated),
          (params,),
          (u,),
        )
        return jax.tree.map(lambda h, x: h + damping * x, along, u)

      u = solve(product, v)
      # If the solver did not converge: NaN, not a silently wrong derivative.
      residual = optax.tree.norm(optax.tree.sub(product(u), v))
      is_solved = residual <= 2 * tolerance * optax.tree.norm(v)
      _, pullback = jax.vjp(
        functools.partial(gradient, params), meta_params, differentiated
      )
      along_meta, along_closed_over = jax.tree.map(
        lambda x: jnp.where(is_solved, -x, jnp.nan), pullback(u)
      )
      # None stands for zeros.
      return along_closed_over, None, along_meta, None, None

    rule.defvjp(forward, backward, symbolic_zeros=True)
    return end._replace(params=rule(closed_over, *args))

  return implicit


def _neumann(product, v, scale, tolerance, max_iterations):
  """Sum α Σ_k (I - α H)^k v until the residual of H u = v is small."""
  wanted = tolerance * optax.tree.norm(v)

  # Without the factor α, the k-th term is v - H u_k, the residual of the terms
  # before it: its norm is the stopping criterion.
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
