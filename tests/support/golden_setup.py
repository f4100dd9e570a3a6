"""The authors' iteration in float64: inputs by recipe, numbers from a file.

`tests/golden/README.md` has the recipe.
"""

import functools
import json
import zlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import models, types
from l2t_jax.method import objectives, optimizers, pair_sets, training, transfer
from l2t_jax.models import torch_weights

_TOLERANCE = 1e-9  # Of the norm of each array.


def read(path):
  """Return (settings, recorded numbers) of a golden file."""
  with np.load(path) as content:
    numbers = {name: content[name] for name in content.files}
  return json.loads(str(numbers.pop("settings"))), numbers


def assert_equal(computed, recorded, name):
  """Assert ‖computed - recorded‖ <= 1e-9 ‖recorded‖, of arrays of one shape."""
  computed, recorded = np.asarray(computed), np.asarray(recorded)
  shape = recorded.shape
  assert computed.shape == shape, f"{name}: {computed.shape} is not {shape}"
  error, norm = np.linalg.norm(computed - recorded), np.linalg.norm(recorded)
  assert error <= _TOLERANCE * norm, f"{name}: off by {error / norm:.2g}"


class Setup:
  """One golden file's networks, states and batches."""

  def __init__(self, settings):
    self.settings = settings
    self.source = models.create("resnet32", 200)
    self.target = models.create("vgg9", settings["classes"])
    shape = (32, 32, 3)
    self.source_taps = models.select_taps(models.trace(self.source, shape))
    self.target_taps = models.select_taps(models.trace(self.target, shape))
    self.pairs = pair_sets.make_pairs(
      "all_to_all", self.source_taps, self.target_taps
    )

  def draw(self, name, shape):
    seed = zlib.crc32(f"{self.settings['seed']}/{name}".encode())
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal(shape)

  def tensor(self, net, name, shape):
    """Draw a tensor in torch's layout."""
    n = self.draw(f"{net}.{name}", shape)
    if name.endswith("running_mean"):
      return 0.1 * n
    if name.endswith("running_var"):
      return 1 + 0.2 * np.abs(n)
    if name.endswith("bias"):
      return 0.05 * n
    if len(shape) == 4:
      return n * np.sqrt(2 / np.prod(shape[1:]))
    if len(shape) == 2:
      return n * np.sqrt(1 / shape[1])
    return (1 + 0.1 * n) * (0.3 if net == "source" else 1)

  def variables(self, net, module):
    shapes = models.trace(module, (32, 32, 3)).variables

    def leaf(path, shape):
      torch_shape = jax.eval_shape(torch_weights.to_torch_layout, shape).shape
      value = self.tensor(net, torch_weights.torch_name(path), torch_shape)
      return jnp.asarray(torch_weights.from_torch_layout(value))

    flat = traverse_util.flatten_dict(shapes)
    variables = traverse_util.unflatten_dict(
      {path: leaf(path, shape) for path, shape in flat.items()}
    )
    return variables.pop("params"), variables

  def params_of_pairs(self):
    """Regressors and meta-parameters."""
    regressors, channel, pair_net = {}, {}, {}
    for k, pair in enumerate(self.pairs):
      c_in = self.target_taps[pair.target][-1]
      c_out = self.source_taps[pair.source][-1]
      weight = self.tensor("regressor", f"{k}.weight", (c_out, c_in, 1, 1))
      regressors[pair.name] = {
        "kernel": jnp.asarray(weight[:, :, 0, 0].T),
        "bias": jnp.asarray(self.tensor("regressor", f"{k}.bias", (c_out,))),
      }
      weight = self.tensor("channel_net", f"{k}.weight", (c_out, c_out))
      bias = self.tensor("channel_net", f"{k}.bias", (c_out,))
      channel[pair.name] = {
        "kernel": jnp.asarray(0.5 * weight.T),
        "bias": jnp.asarray(0.5 * bias),
      }
      weight = self.tensor("pair_net", f"{k}.weight", (1, c_out))
      bias = self.tensor("pair_net", f"{k}.bias", (1,))
      pair_net[pair.name] = {
        "kernel": jnp.asarray(0.2 * weight.T),
        "bias": jnp.asarray(1 + bias),
      }
    return regressors, {"channel": channel, "pair": pair_net}

  def start(self):
    """Return (train state, sources) before the first iteration."""
    params, model_state = self.variables("target", self.target)
    regressors, meta_params = self.params_of_pairs()
    params = {"target": params, "regressors": regressors}
    inner = types.InnerState(
      params, self.optimizer_fn(0.0).init(params), model_state
    )
    meta_opt_state = self.meta_optimizer.init(meta_params)
    sources = {"": training.Variables(*self.variables("source", self.source))}
    step = jnp.zeros((), jnp.int32)
    return types.TrainState(step, inner, meta_params, meta_opt_state), sources

  def batch(self, iteration):
    size = self.settings["batch"]
    images = self.draw(f"images.{iteration}", (size, 3, 32, 32))
    labels = (np.arange(size) * 7 + iteration) % self.settings["classes"]
    return types.Batch(
      jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels)
    )

  @property
  def optimizer_fn(self):
    return optimizers.sgd(
      momentum=self.settings["momentum"],
      weight_decay=self.settings["weight_decay"],
    )

  @property
  def meta_optimizer(self):
    return optimizers.adam_l2(
      self.settings["meta_lr"], self.settings["meta_weight_decay"]
    )

  @property
  def source_fn(self):
    return models.as_apply_fn(self.source)

  def make_train_step(self, mode, rolled=True):
    matching = objectives.matching(self.pairs, beta=self.settings["beta"])
    problem = training.Problem(
      objectives.make_losses(
        models.as_apply_fn(self.target), {"matching": matching}
      ),
      {"": self.source_fn},
      self.pairs,
      self.target_taps,
      functools.partial(transfer.transfer_weights, pairs=self.pairs),
    )
    recipe = training.Recipe(
      self.optimizer_fn,
      lambda step: self.settings["lr"],
      self.meta_optimizer,
      num_inner_steps=self.settings["T"],
      mode=mode,
      rolled=rolled,
    )
    return training.make_train_step(problem, recipe)

  def meta_gradient(self, before, after):
    """Recover the meta-gradient from Adam's first moments, before and after.

    With L2 in the gradient, mu' = 0.9 mu + 0.1 (gradient + decay * params).
    """
    _, (adam_before, *_) = before.meta_opt_state
    _, (adam_after, *_) = after.meta_opt_state
    decay = self.settings["meta_weight_decay"]
    return jax.tree.map(
      lambda mu, new_mu, param: (new_mu - 0.9 * mu) / (1 - 0.9) - decay * param,
      adam_before.mu,
      adam_after.mu,
      before.meta_params,
    )
