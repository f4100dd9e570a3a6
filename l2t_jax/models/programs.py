"""Networks of other libraries as exported programs that need only JAX to run.

A program computes logits and features from weights and RGB images [B, S, S, 3],
which have a fixed size S and values from 0 to 1. The preprocessing that the
network expects (normalisation, another order of channels, another scale) is
part of the program, which always runs in eval mode. `l2t_jax.pretrained` makes
programs; to run one, neither the original library nor its code is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import difflib
import hashlib
import re
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from l2t_jax import errors, types
from l2t_jax.models import pure_functions

# Libraries of networks, which are given as LIBRARY:NAME.
LIBRARIES = ("timm", "keras", "torch")
# Requirements on the code of a network, for error messages.
HOW_TO_BE_TRACED = (
  "its forward pass must not branch on values of tensors (no .item()), nor fix"
  " the number of images"
)
# The platforms that a program is lowered for.
_PLATFORMS = ("cpu", "cuda", "tpu")
# Custom calls that a program may contain: XLA's own functions and annotations,
# which run no code from the file.
_ALLOWED_CALLS = {"shape_assertion", "Sharding", "mhlo.erf", "mhlo.topk"}


class Reading(NamedTuple):
  """Image size and normalisation of a network; 0 and () if unknown."""

  image_size: int = 0  # Height and width in pixels.
  mean: tuple[float, ...] = ()  # On a scale from 0 to 1.
  std: tuple[float, ...] = ()

  def or_else(
    self, image_size: int, mean: Sequence[float], std: Sequence[float]
  ) -> Reading:
    """Return a copy in which these values replace unknown ones."""
    return Reading(
      self.image_size or image_size,
      self.mean or tuple(mean),
      self.std or tuple(std),
    )


# Mean and standard deviation of ImageNet, as in torchvision's networks.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Exportable(NamedTuple):
  """A network of another library as a pure function, with its metadata."""

  # (params, images [B, S, S, 3]) -> (logits [B, K], *features [B, H, W, C]).
  apply: Callable[..., tuple[Any, ...]]
  params: Mapping[str, np.ndarray]
  # images [B, S, S, 3] -> logits [B, K], as the library itself computes them.
  reference: Callable[[np.ndarray], np.ndarray]
  image_size: int  # S.
  taps: tuple[str, ...] = ()  # Names of the features, in computed order.
  default_taps: tuple[str, ...] = ()  # As in `Functions`.
  metadata: Mapping[str, str] = {}  # For the weight file.
  # Notes for the user: choices that were made, tensors that were left over.
  notes: tuple[str, ...] = ()


def export(
  network: Exportable, *, dtype: Any = None, precision: str = "highest"
) -> bytes:
  """Trace and lower a network with a variable batch size.

  Args:
    network: what to export.
    dtype: dtype of the activations; None for that of the parameters.
    precision: of matrix products, as in `jax.default_matmul_precision`.

  Returns:
    The serialized program with its first-order VJP.
  """

  def run(params, images):
    if dtype is not None:
      params, images = jax.tree.map(lambda x: x.astype(dtype), (params, images))
    outputs = network.apply(params, images)
    return tuple(x.astype(jnp.float32) for x in outputs)

  (batch,) = jax.export.symbolic_shape("b")
  size = network.image_size
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
  params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, network.params))
  with jax.default_matmul_precision(precision):
    exported = jax.export.export(jax.jit(run), platforms=_PLATFORMS)(
      params, images
    )
    return bytes(exported.serialize(vjp_order=1))


def to_functions(
  program: bytes,
  params: types.PyTree,
  taps: Sequence[str],
  default_taps: Sequence[str] = (),
) -> pure_functions.Functions:
  """Turn a program into a network.

  Under `jax.vmap`, calls are merged into a single call with a larger batch.

  Args:
    program: from `export`.
    params: the weights.
    taps: names of the features, in computed order.
    default_taps: as in `Functions`.

  Raises:
    errors.InputError: this version of JAX cannot read the program, or the
      program calls code that is not XLA's.
  """
  try:
    exported = jax.export.deserialize(bytearray(program))
    backward = exported.vjp()
  except Exception as error:  # A damaged file raises many types of errors.
    raise errors.InputError(
      f"jax {jax.__version__} cannot read the program:"
      f" {errors.in_one_line(error)}"
    ) from error
  _check_calls(exported)
  _check_calls(backward)

  @jax.custom_batching.custom_vmap
  def forward(params, images):
    return exported.call(params, images)

  @forward.def_vmap
  def forward_together(axis_size, are_batched, params, images):
    if any(jax.tree.leaves(are_batched[0])):
      raise errors.InputError(
        "the weights of a converted network cannot have an axis of jax.vmap;"
        " only its images can"
      )
    del axis_size
    # Merge the mapped axis with the batch axis, and split the outputs again.
    outputs = exported.call(params, images.reshape(-1, *images.shape[2:]))
    split = lambda x: x.reshape(*images.shape[:2], *x.shape[1:])
    return jax.tree.map(split, outputs), jax.tree.map(lambda _: True, outputs)

  # Not merged: a single call would sum the gradients w.r.t. the weights over
  # the mapped axis.
  @jax.custom_batching.sequential_vmap
  def differentiate(params, images, cotangents):
    return jax.vjp(exported.call, params, images)[1](cotangents)

  # `custom_vmap` alone does not support reverse-mode differentiation.
  call = jax.custom_vjp(forward)
  call.defvjp(
    lambda *primals: (forward(*primals), primals),
    lambda primals, cotangents: differentiate(*primals, cotangents),
  )

  def apply(params, model_state, images, *, train):
    del train
    logits, *features = call(params, images)
    return logits, dict(zip(taps, features, strict=True)), model_state

  return pure_functions.Functions(
    lambda key: (params, {}),
    apply,
    tuple(default_taps),
    hashlib.sha256(program).hexdigest()[:16],
  )


def did_you_mean(name: str, names: Iterable[str]) -> str:
  """Return "; did you mean ...?" with close names, or ""."""
  close = difflib.get_close_matches(name, names, n=3)
  return f"; did you mean {' or '.join(close)}?" if close else ""


def _check_calls(exported):
  """Raise if a program contains other custom calls, before it is run."""
  text = exported.mlir_module()
  called = re.findall(
    r"custom_call\"?(?: @|.*?call_target_name = \")([\w.$-]+)", text
  )
  if refused := sorted(set(called) - _ALLOWED_CALLS):
    raise errors.InputError(
      f"the program calls {', '.join(refused)}, which is not run: allowed are"
      f" {', '.join(sorted(_ALLOWED_CALLS))}"
    )
  if text.count("custom_call") != len(called):
    raise errors.InputError("the program calls code whose name cannot be read")
