"""The same iteration in PyTorch, as strong as PyTorch makes it.

What a user would run instead: ResNet-32 -> VGG-9, all pairs, the look-ahead
differentiated by double backward through the unrolled loop. Functional calls
(`torch.func`), so that a step which nothing upstream depends on is not
differentiated; the source once a batch; its resized maps once; one 1x1
convolution per target tap for all its regressors; fused updates of all
tensors; channels-last; `torch.compile` for the plain step (it has no double
backward). `authors_iteration` computes the same by the scheme of the paper's
code. `tests/test_benchmarks.py` holds both to the golden numbers.

Tensors have PyTorch's layout and the names of the authors' checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np
import torch
import torch.nn.functional as F

from l2t_jax import types
from l2t_jax.method import pair_sets, training
from l2t_jax.models import torch_weights

Tensors = Mapping[str, torch.Tensor]

VGG9 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
TARGET_WIDTHS = (64, 128, 256, 512, 512)  # Of the maps that enter a max-pool.
SOURCE_WIDTHS = (16, 32, 64)
SOURCE_TAPS = (4, 9, 14)  # Blocks of ResNet-32, counted from 0.
NUM_PAIRS = len(SOURCE_WIDTHS) * len(TARGET_WIDTHS)  # Source-major.


class Settings(NamedTuple):
  """Hyper-parameters of an iteration."""

  num_inner_steps: int = 2
  beta: float = 0.5
  learning_rate: float = 0.1
  momentum: float = 0.9
  weight_decay: float = 1e-4


class State(NamedTuple):
  """What an iteration reads and writes, but for the meta-parameters."""

  params: dict[str, torch.Tensor]  # "target.*" and "regressor.*".
  momentum: dict[str, torch.Tensor]
  running: dict[str, torch.Tensor]  # Batch statistics of the target.


class Weights(NamedTuple):
  """w and λ, one entry a pair."""

  channel: list[torch.Tensor]  # [B, C_m].
  pair: list[torch.Tensor]  # [B].


def vgg9(
  params: Tensors, images: torch.Tensor, running: Tensors | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
  """Return (logits, maps that enter a max-pool) in train mode.

  Running statistics are updated in place where they are given.
  """
  x, index, taps = images, 0, []
  for entry in VGG9:
    name = f"target.features.{index}"
    if entry == "M":
      taps.append(x)
      x = F.max_pool2d(x, 2)
      index += 1
      continue
    x = F.conv2d(x, params[f"{name}.weight"], params[f"{name}.bias"], padding=1)
    name = f"target.features.{index + 1}"
    x = F.batch_norm(
      x,
      running[f"{name}.running_mean"] if running else None,
      running[f"{name}.running_var"] if running else None,
      params[f"{name}.weight"],
      params[f"{name}.bias"],
      training=True,
    )
    x = F.relu(x)
    index += 3
  classifier = "target.classifier"
  logits = F.linear(
    x.flatten(1), params[f"{classifier}.weight"], params[f"{classifier}.bias"]
  )
  return logits, taps


def resnet32(
  tensors: Tensors, images: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
  """Return (logits, outputs of blocks 4, 9 and 14) in eval mode."""

  def norm(x, name):
    mean, var, scale, bias = (
      tensors[f"{name}.{leaf}"]
      for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, scale, bias)

  def block(x, name, stride):
    conv = lambda x, i, stride: F.conv2d(
      x, tensors[f"{name}.conv{i}.weight"], stride=stride, padding=1
    )
    y = F.relu(norm(conv(x, 1, stride), f"{name}.bn1"))
    y = norm(conv(y, 2, 1), f"{name}.bn2")
    if f"{name}.downsample.0.weight" in tensors:
      x = F.conv2d(x, tensors[f"{name}.downsample.0.weight"], stride=stride)
      x = norm(x, f"{name}.downsample.1")
    return F.relu(x + y)

  x = F.conv2d(
    images, tensors["conv1.weight"], tensors["conv1.bias"], padding=1
  )
  x = F.relu(norm(x, "bn1"))
  outputs = []
  for stage in range(3):
    x = block(x, f"block{2 * stage + 1}", stride=2 if stage else 1)
    outputs.append(x)
    for i in range(4):
      x = block(x, f"blocks{2 * stage + 2}.{i}", stride=1)
      outputs.append(x)
  logits = F.linear(x.mean((2, 3)), tensors["fc.weight"], tensors["fc.bias"])
  return logits, [outputs[block] for block in SOURCE_TAPS]


def source_maps(
  source: Tensors, images: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
  """Run the source once.

  Returns:
    (maps, pooled): for each target tap all source maps at its size, one
    behind the other, [B, ΣC_m, H, W]; for each source tap its mean [B, C_m].
  """
  with torch.no_grad():
    _, features = resnet32(source, images)
    wide = torch.promote_types(features[0].dtype, torch.float32)
    features = [feature.to(wide) for feature in features]
    pooled = [feature.mean((2, 3)) for feature in features]
    size = images.shape[-1]
    maps = []
    for n in range(len(TARGET_WIDTHS)):
      resized = [
        F.interpolate(feature, size >> n, mode="bilinear", align_corners=False)
        for feature in features
      ]
      maps.append(torch.cat(resized, dim=1))
  return maps, pooled


def transfer_weights(
  meta_params: Tensors, pooled: Sequence[torch.Tensor]
) -> Weights:
  """Return w and λ of each pair for each image."""
  channel, pair = [], []
  for k in range(NUM_PAIRS):
    x = pooled[k // len(TARGET_WIDTHS)]
    linear = lambda net, k=k, x=x: F.linear(
      x, meta_params[f"{net}.{k}.weight"], meta_params[f"{net}.{k}.bias"]
    )
    channel.append(torch.softmax(linear("channel_net"), dim=-1))
    pair.append(F.relu6(linear("pair_net"))[:, 0])
  return Weights(channel, pair)


def matching_loss(
  params: Tensors,
  taps: Sequence[torch.Tensor],
  weights: Weights,
  maps: Sequence[torch.Tensor],
  beta: float,
) -> torch.Tensor:
  """L_wfm; one 1x1 convolution per target tap."""
  loss = torch.zeros((), device=taps[0].device, dtype=maps[0].dtype)
  for n, (tap, wanted) in enumerate(zip(taps, maps, strict=True)):
    pairs = range(n, NUM_PAIRS, len(TARGET_WIDTHS))
    regressed = F.conv2d(
      tap.to(wanted.dtype),
      torch.cat([params[f"regressor.{k}.weight"] for k in pairs]),
      torch.cat([params[f"regressor.{k}.bias"] for k in pairs]),
    )
    distance = (wanted - regressed).square().mean((2, 3))
    weight = [weights.pair[k][:, None] * weights.channel[k] for k in pairs]
    loss = loss + (torch.cat(weight, dim=1) * distance).sum(1).mean()
  return beta * loss


def sgd(
  params: dict[str, torch.Tensor],
  momentum: dict[str, torch.Tensor],
  grads: dict[str, torch.Tensor],
  settings: Settings,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
  """One differentiable update of all tensors; fused."""
  values = [params[name] for name in params]
  steps = torch._foreach_add(
    [grads[name] for name in params], values, alpha=settings.weight_decay
  )
  buffers = torch._foreach_add(
    steps, [momentum[name] for name in params], alpha=settings.momentum
  )
  values = torch._foreach_add(values, buffers, alpha=-settings.learning_rate)
  return (
    dict(zip(params, values, strict=True)),
    dict(zip(params, buffers, strict=True)),
  )


def plain_step(
  state: State, images: torch.Tensor, labels: torch.Tensor, settings: Settings
) -> State:
  """A training step with cross-entropy alone, the fast way: autograd."""
  leaves = {k: v.detach().requires_grad_() for k, v in state.params.items()}
  logits, _ = vgg9(leaves, images, state.running)
  loss = F.cross_entropy(logits, labels)
  grads = torch.autograd.grad(loss, list(leaves.values()))
  with torch.no_grad():
    params, momentum = sgd(
      state.params,
      state.momentum,
      dict(zip(leaves, grads, strict=True)),
      settings,
    )
  return State(params, momentum, state.running)


def iteration(
  state: State,
  meta_params: dict[str, torch.Tensor],
  source: Tensors,
  images: torch.Tensor,
  labels: torch.Tensor,
  settings: Settings,
) -> tuple[State, dict[str, torch.Tensor], dict[str, Any]]:
  """One iteration of the method, up to the update of the meta-parameters.

  Args:
    state: before the real update; its running statistics change in place.
    meta_params: of f and g, "channel_net.K.*" and "pair_net.K.*".
    source: its tensors.
    images: [B, 3, 32, 32].
    labels: [B].
    settings: hyper-parameters.

  Returns:
    (state after the real update, hypergradient, metrics).
  """
  maps, pooled = source_maps(source, images)

  def target_loss(params):
    logits, _ = vgg9(params, images, None)
    return F.cross_entropy(logits, labels)

  def auxiliary_loss(params, weights):
    _, taps = vgg9(params, images, None)
    return matching_loss(params, taps, weights, maps, settings.beta)

  def total_loss(params, weights):
    logits, taps = vgg9(params, images, state.running)
    target = F.cross_entropy(logits, labels)
    auxiliary = matching_loss(params, taps, weights, maps, settings.beta)
    return target + auxiliary, (target.detach(), auxiliary.detach())

  weights = transfer_weights(meta_params, pooled)
  grads, (target, auxiliary) = torch.func.grad(total_loss, has_aux=True)(
    state.params, weights
  )
  params, momentum = sgd(state.params, state.momentum, grads, settings)
  state = State(params, momentum, state.running)

  def outer(meta_params):
    weights = transfer_weights(meta_params, pooled)
    params, momentum = state.params, state.momentum
    for _ in range(settings.num_inner_steps):
      grads = torch.func.grad(auxiliary_loss)(params, weights)
      params, momentum = sgd(params, momentum, grads, settings)
    grads = torch.func.grad(target_loss)(params)
    params, _ = sgd(params, momentum, grads, settings)
    return target_loss(params)

  meta_grads, outer_loss = torch.func.grad_and_value(outer)(meta_params)
  metrics = {
    "ce": target,
    "match": auxiliary,
    "outer_ce": outer_loss,
    "pair_weight_mean": torch.stack([x.mean() for x in weights.pair]),
  }
  return state, meta_grads, metrics


def authors_iteration(
  state: State,
  meta_params: dict[str, torch.Tensor],
  source: Tensors,
  images: torch.Tensor,
  labels: torch.Tensor,
  settings: Settings,
) -> tuple[State, dict[str, torch.Tensor], dict[str, Any]]:
  """The same iteration by the scheme of the authors' code.

  The source runs again for each loss that reads it, each pair has a regressor
  and a resized map of its own, the look-ahead keeps no graph, and on the way
  back each of its steps is computed again and differentiated by double
  backward. Arguments and results are those of `iteration`.
  """

  def target_loss(params, meta_params):
    del meta_params
    logits, _ = vgg9(params, images, None)
    return F.cross_entropy(logits, labels)

  def auxiliary_loss(params, meta_params):
    _, taps = vgg9(params, images, None)
    return _loss_pair_by_pair(
      params, meta_params, taps, source, images, settings.beta
    )[0]

  params = _leaves(state.params)
  logits, taps = vgg9(params, images, state.running)
  target = F.cross_entropy(logits, labels)
  auxiliary, pair_weights = _loss_pair_by_pair(
    params, meta_params, taps, source, images, settings.beta
  )
  grads = torch.autograd.grad(target + auxiliary, list(params.values()))
  state = State(*_sgd_without_graph(state, grads, settings), state.running)

  # The look-ahead, of which only the values before each step are kept.
  losses = [auxiliary_loss] * settings.num_inner_steps + [target_loss]
  starts = [state]
  for loss_fn in losses:
    params = _leaves(starts[-1].params)
    grads = _gradient(loss_fn(params, meta_params), params)
    stepped = _sgd_without_graph(starts[-1], grads, settings)
    starts.append(State(*stepped, state.running))

  # The backward pass, from the last step to the first. Each step turns the
  # cotangents of the parameters and the momentum after it into those before it.
  phi = _leaves(meta_params)
  params = _leaves(starts.pop().params)
  outer_loss = target_loss(params, phi)
  along = _gradient(outer_loss, params)
  along_momentum = [torch.zeros_like(x) for x in along]
  meta_grads = [torch.zeros_like(x) for x in phi.values()]
  for loss_fn in losses[::-1]:
    params = _leaves(starts.pop().params)
    grads = _gradient(loss_fn(params, phi), params, create_graph=True)
    with torch.no_grad():
      along_momentum = torch._foreach_add(
        along_momentum, along, alpha=-settings.learning_rate
      )
    reached = [
      (grad, cotangent)
      for grad, cotangent in zip(grads, along_momentum, strict=True)
      if grad.requires_grad
    ]
    products = torch.autograd.grad(
      [grad for grad, _ in reached],
      [*params.values(), *phi.values()],
      [cotangent for _, cotangent in reached],
      allow_unused=True,
    )
    with torch.no_grad():
      along = torch._foreach_add(
        along, along_momentum, alpha=settings.weight_decay
      )
      along = _add(along, products[: len(along)])
      meta_grads = _add(meta_grads, products[len(along) :])
      along_momentum = torch._foreach_mul(along_momentum, settings.momentum)
  metrics = {
    "ce": target.detach(),
    "match": auxiliary.detach(),
    "outer_ce": outer_loss.detach(),
    "pair_weight_mean": torch.stack([x.mean() for x in pair_weights]).detach(),
  }
  return state, dict(zip(phi, meta_grads, strict=True)), metrics


def _loss_pair_by_pair(params, meta_params, taps, source, images, beta):
  """Return (L_wfm, λ of each pair); the source runs once more."""
  with torch.no_grad():
    _, features = resnet32(source, images)
  wide = torch.promote_types(features[0].dtype, torch.float32)
  pooled = [feature.to(wide).mean((2, 3)) for feature in features]
  weights = transfer_weights(meta_params, pooled)
  loss = torch.zeros((), device=images.device, dtype=wide)
  for k in range(NUM_PAIRS):
    m, n = divmod(k, len(TARGET_WIDTHS))
    wanted = F.interpolate(
      features[m].to(wide),
      taps[n].shape[-1],
      mode="bilinear",
      align_corners=False,
    )
    regressed = F.conv2d(
      taps[n].to(wide),
      params[f"regressor.{k}.weight"],
      params[f"regressor.{k}.bias"],
    )
    distance = (wanted - regressed).square().mean((2, 3))
    distance = (weights.channel[k] * distance).sum(1)
    loss = loss + (weights.pair[k] * distance).mean()
  return beta * loss, weights.pair


def _leaves(tensors):
  return {k: v.detach().requires_grad_() for k, v in tensors.items()}


def _gradient(loss, params, create_graph=False):
  """Return a gradient per parameter, zeros where the loss reads none."""
  grads = torch.autograd.grad(
    loss, list(params.values()), create_graph=create_graph, allow_unused=True
  )
  return [
    torch.zeros_like(x) if grad is None else grad
    for x, grad in zip(params.values(), grads, strict=True)
  ]


def _sgd_without_graph(state, grads, settings):
  with torch.no_grad():
    return sgd(
      state.params,
      state.momentum,
      dict(zip(state.params, grads, strict=True)),
      settings,
    )


def _add(tensors, more):
  """Add tensors, of which some of the second list may be None."""
  return [x if y is None else x + y for x, y in zip(tensors, more, strict=True)]


def adam_l2(
  meta_params: dict[str, torch.Tensor], learning_rate: float, decay: float
) -> Callable[[dict[str, torch.Tensor]], None]:
  """Make an update of the meta-parameters in place, L2 in the gradient."""
  optimizer = torch.optim.Adam(
    list(meta_params.values()), lr=learning_rate, weight_decay=decay
  )

  def update(grads):
    for name, value in meta_params.items():
      value.grad = grads[name]
    optimizer.step()

  return update


class Start(NamedTuple):
  """What an iteration starts from."""

  state: State
  meta_params: dict[str, torch.Tensor]
  source: dict[str, torch.Tensor]


def from_jax(
  state: types.TrainState,
  source: training.Variables,
  pairs: Sequence[pair_sets.Pair],
  place: Callable[[torch.Tensor], torch.Tensor],
) -> Start:
  """Take over values of the JAX implementation.

  Args:
    state: before the first iteration; its momentum is zero.
    source: variables of the source network.
    pairs: all of them, source-major.
    place: puts a tensor where it is computed on, and into a layout.
  """
  tensor = lambda x: place(torch.from_numpy(np.array(x)))

  def network(variables, prefix=""):
    flat = traverse_util.flatten_dict(variables)
    return {
      prefix + torch_weights.torch_name(path): tensor(
        torch_weights.to_torch_layout(x)
      )
      for path, x in flat.items()
    }

  params = network({"params": state.inner.params["target"]}, "target.")
  for k, pair in enumerate(pairs):
    layer = state.inner.params["regressors"][pair.name]
    kernel = np.array(layer["kernel"]).T[:, :, None, None]
    params[f"regressor.{k}.weight"] = tensor(kernel)
    params[f"regressor.{k}.bias"] = tensor(layer["bias"])
  meta_params = {}
  for theirs, ours in (("channel_net", "channel"), ("pair_net", "pair")):
    for k, pair in enumerate(pairs):
      layer = state.meta_params[ours][pair.name]
      meta_params[f"{theirs}.{k}.weight"] = tensor(np.array(layer["kernel"]).T)
      meta_params[f"{theirs}.{k}.bias"] = tensor(layer["bias"])
  return Start(
    State(
      params,
      {name: torch.zeros_like(value) for name, value in params.items()},
      network(state.inner.model_state, "target."),
    ),
    meta_params,
    network({"params": source.params, **source.model_state}),
  )
