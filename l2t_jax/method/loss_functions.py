"""The losses of the baselines, one equation of a paper per function."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax

from l2t_jax.method import transfer


def cross_entropy(
  logits: chex.Array, labels: chex.Array, *, smoothing: float = 0.0
) -> chex.Array:
  """Compute the mean softmax cross-entropy [] in nats.

  Differentiable in `logits`.

  Args:
    logits: [B, K].
    labels: [B], integers; or [B, K], a distribution over the classes.
    smoothing: share of a label's weight that is spread evenly over all K
      classes, as in PyTorch.
  """
  chex.assert_rank([logits, labels], [2, {1, 2}])
  if labels.ndim == 1:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  else:
    losses = optax.softmax_cross_entropy(logits, labels)
  if smoothing:
    even = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
    losses = (1 - smoothing) * losses + smoothing * even
  return jnp.mean(losses)


def is_right(logits: chex.Array, labels: chex.Array) -> chex.Array:
  """Return [B], 1 for each image whose largest logit is the label's, else 0.

  Args:
    logits: [B, K].
    labels: [B], integers.
  """
  return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def softened_cross_entropy(
  logits: chex.Array, source_logits: chex.Array, *, temperature: float
) -> chex.Array:
  """Compute the cross-entropy with softened outputs of the source.

      mean over images of -Σ_k softmax(z_s / T)_k log softmax(z / T)_k

  The distillation loss of Li and Hoiem, "Learning without Forgetting", TPAMI
  2018 (arXiv 1606.09282), equations 2 and 3. Differentiable in `logits`.

  Args:
    logits: z, [N, K].
    source_logits: z_s, [N, K].
    temperature: T; the paper uses 2.

  Returns:
    The loss in nats, [].
  """
  chex.assert_equal_shape([logits, source_logits])
  logits, source_logits = map(
    transfer.at_least_float32, (logits, source_logits)
  )
  wanted = jax.nn.softmax(source_logits / temperature)
  log_probabilities = jax.nn.log_softmax(logits / temperature)
  return -jnp.mean(jnp.sum(wanted * log_probabilities, axis=-1))


def distillation_loss(
  logits: chex.Array, source_logits: chex.Array, *, temperature: float
) -> chex.Array:
  """Compute the knowledge-distillation loss.

      T² · mean over images of KL(softmax(z_s / T) ‖ softmax(z / T))

  The factor T² keeps gradients from shrinking with the temperature.

  Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network",
  2015 (arXiv 1503.02531), section 2. Differentiable in `logits`.

  Args:
    logits: z, [N, K].
    source_logits: z_s, [N, K].
    temperature: T.

  Returns:
    The loss in nats, [].
  """
  soften = lambda z: softened_cross_entropy(
    z, source_logits, temperature=temperature
  )
  return temperature**2 * (soften(logits) - soften(source_logits))


def kernel_distance(
  features: chex.Array, source_features: chex.Array
) -> chex.Array:
  """Compute how differently two feature vectors relate images to each other.

      sqrt(mean over pairs of images i, j of (k(φ)_ij - k(ψ)_ij)² + 1e-8)

  k(φ)_ij is the cosine of the angle between φ_i and φ_j, after the mean over
  the images is subtracted from both. The loss of "Transferring Knowledge from
  Large Foundation Models to Small Downstream Models" (AFT), Qiu et al., ICML
  2024 (arXiv 2406.07337), section 3, as in the authors' code. Differentiable in
  both arguments.

  Args:
    features: φ, [N, C].
    source_features: ψ, [N, D], scaled by the learned weights of its channels.

  Returns:
    The loss, [].
  """
  chex.assert_rank([features, source_features], 2)
  chex.assert_equal_shape_prefix([features, source_features], 1)

  def kernel(x):
    x = transfer.at_least_float32(x)
    x = of_unit_length(x - jnp.mean(x, axis=0))
    return x @ x.T

  difference = kernel(features) - kernel(source_features)
  # The constant keeps the root differentiable at 0.
  return jnp.sqrt(jnp.mean(jnp.square(difference)) + 1e-8)


def attention_map(features: chex.Array) -> chex.Array:
  """Compute an attention map: the mean of x² over channels, of unit length.

  Args:
    features: [N, H, W, C].

  Returns:
    [N, H·W], rows of Euclidean norm 1 (0 if all features of an image are 0).
  """
  return of_unit_length(transfer.energy(features))


def of_unit_length(x: chex.Array) -> jax.Array:
  """Flatten to rows [N, D] of Euclidean norm 1; rows of zeros stay."""
  x = x.reshape(len(x), -1)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # The norm is not differentiable at a row of zeros: bound its square below.
  tiny = jnp.finfo(square.dtype).tiny
  return x * jax.lax.rsqrt(jnp.where(square > tiny, square, tiny))


def attention_loss(
  source_features: chex.Array, target_features: chex.Array
) -> chex.Array:
  """Compute the distance between the attention maps of source and target.

      mean over images and positions of (Q(S) - Q(T))²,  Q = `attention_map`

  Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017
  (arXiv 1612.03928), equation 2 with p = 2, squared and averaged as in the
  authors' code, for which β = 1000. Differentiable in both arguments.

  Args:
    source_features: S, [N, H, W, C_m].
    target_features: T, [N, H, W, C_n].

  Returns:
    The loss, [].
  """
  source, target = map(attention_map, (source_features, target_features))
  chex.assert_equal_shape([source, target])
  return jnp.mean(jnp.square(source - target))
