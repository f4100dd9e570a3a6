"""Access to the layers inside a `jax.lax.scan`, one by one.

Libraries scan over identical layers, so that only one of them is compiled. The
output of a layer inside the loop is not visible from outside, but it is the
loop's carry, which the loop can return after every step. This works with any
library, because the loops are found in the network's jaxpr.
"""

from __future__ import annotations

from collections.abc import Callable
import re
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

# Longer loops are assumed to run over positions, not layers.
_MAX_LAYERS = 128
# Primitives that call a jaxpr once: those of `jax.jit` and `jax.checkpoint`.
_JIT, _CHECKPOINT = ("jit", "pjit"), ("checkpoint", "remat", "remat2")


def is_layer(name: str) -> bool:
  """Return whether a name is that of a scanned layer."""
  return re.search(r"(^|/)scan(#\d+)?/\d+$", name) is not None


def with_layers(function: Callable[..., Any]) -> Callable[..., Any]:
  """Transform a function to also return the layers of its loops.

  Args:
    function: a function of PyTrees of arrays.

  Returns:
    A function that returns (result, {"module/scan/0": layer [B, ...], ...}).
    Further loops of a module are "scan#1" and so on. The layers are the first
    carry with three or four axes, after each step.
  """

  def transformed(*args):
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    layers: dict[str, jax.Array] = {}
    outputs = _evaluate(jaxpr, jax.tree.leaves(args), "", layers)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs), layers

  return transformed


def _evaluate(closed, args, module, layers):
  """Evaluate a jaxpr; add the layers of its loops to `layers`.

  Args:
    closed: the jaxpr, with its constants.
    args: the inputs of the jaxpr.
    module: path of the module that calls it, with the network's name in front.
    layers: name -> layer.
  """
  jaxpr = closed.jaxpr
  values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  values |= zip(jaxpr.invars, args, strict=True)

  def read(x):
    return x.val if isinstance(x, jax.extend.core.Literal) else values[x]

  for equation in jaxpr.eqns:
    inputs = [read(x) for x in equation.invars]
    primitive, params = equation.primitive, equation.params
    inner = str(equation.source_info.name_stack)
    path = "/".join(filter(None, (module, inner)))
    if primitive.name == "scan":
      outputs, steps = _scan(params, inputs)
      layers |= _name(steps, path, layers)
    elif primitive.name in _JIT and _has_scan(params["jaxpr"]):
      outputs = _evaluate(params["jaxpr"], inputs, path, layers)
    elif primitive.name in _CHECKPOINT and _has_scan(params["jaxpr"]):
      outputs, found = _evaluate_checkpoint(params, inputs, path, layers)
      layers |= found
    else:
      # As in `jax.core.eval_jaxpr`.
      with equation.ctx.manager:
        outputs = primitive.bind(*inputs, **primitive.get_bind_params(params))
      outputs = outputs if primitive.multiple_results else [outputs]
    values |= zip(equation.outvars, outputs, strict=True)
  return [read(x) for x in jaxpr.outvars]


def _evaluate_checkpoint(params, inputs, module, layers):
  """Evaluate a jaxpr in `jax.checkpoint`; return (outputs, its layers)."""
  closed = jax.extend.core.ClosedJaxpr(params["jaxpr"], ())

  # Layers must be outputs: a tracer may not leave `evaluate` otherwise. Names
  # of earlier layers are passed in, because `_name` counts them.
  def evaluate(*inputs):
    known = dict.fromkeys(layers)
    outputs = _evaluate(closed, inputs, module, known)
    return outputs, {n: x for n, x in known.items() if n not in layers}

  return jax.checkpoint(
    evaluate, prevent_cse=params["prevent_cse"], policy=params["policy"]
  )(*inputs)


def _has_scan(jaxpr):
  """Return whether a jaxpr contains a scan, at any depth of its calls."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # Unwrap a `ClosedJaxpr`.
  return any(
    e.primitive.name == "scan"
    or (
      e.primitive.name in (*_JIT, *_CHECKPOINT) and _has_scan(e.params["jaxpr"])
    )
    for e in jaxpr.eqns
  )


def _scan(params, inputs):
  """Run a scan; return its outputs, and the layers: a carry after each step."""
  num_consts, num_carry = params["num_consts"], params["num_carry"]
  consts = inputs[:num_consts]
  first = inputs[num_consts : num_consts + num_carry]
  body = jax.extend.core.jaxpr_as_fun(params["jaxpr"])
  features = [i for i, x in enumerate(first) if jnp.ndim(x) in (3, 4)]
  kept = features[:1] if params["length"] <= _MAX_LAYERS else []

  def step(carry, x):
    outputs = body(*consts, *carry, *x)
    carry, ys = outputs[:num_carry], outputs[num_carry:]
    return carry, (ys, [carry[i] for i in kept])

  carry, (ys, steps) = jax.lax.scan(
    step,
    first,
    inputs[num_consts + num_carry :],
    length=params["length"],
    reverse=params["reverse"],
    unroll=params["unroll"],
  )
  in_order = slice(None, None, -1 if params["reverse"] else 1)
  layers = [layer for stacked in steps for layer in stacked[in_order]]
  if layers:
    # Return the last layer itself as the carry: `networks.trace` recognises a
    # module that returns it by the same variable, and lists the layer first.
    carry[kept[0]] = layers[-1]
  return [*carry, *ys], layers


def _name(steps, path, layers):
  """Return name -> layer for the layers of a loop in a module."""
  name = "/".join([*path.split("/")[1:], "scan"])
  count = sum(re.sub(r"#\d+", "", other) == f"{name}/0" for other in layers)
  name += f"#{count}" if count else ""
  return {f"{name}/{i}": layer for i, layer in enumerate(steps)}
