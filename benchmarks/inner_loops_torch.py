"""One cell of benchmarks/inner_loops.py, in torch or a library on top of it.

    python -m benchmarks.inner_loops_torch CELL

CELL is a JSON object with the fields of `inner_loops.Cell`. The virtual
environment has torch, NumPy and one library, but not this package. The
hypergradient is saved; the last line is a JSON object.

Every way below is exact: it differentiates all steps and the momentum.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import json
import os
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks import measuring

# Of a kernel, from JAX's order of dimensions (HWIO) to torch's (OIHW).
_ORDERS = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


class Problem(NamedTuple):
  """The bilevel problem, and the settings of the inner optimizer."""

  network: nn.Module  # [B, 64] -> logits [B, 10]; at its first parameters.
  weights: nn.Parameter  # [B]; the meta-parameters, before the sigmoid.
  x: torch.Tensor  # [B, 64]
  y: torch.Tensor  # [B]
  held_out_x: torch.Tensor  # [B, 64]
  held_out_y: torch.Tensor  # [B]
  num_steps: int
  rate: float
  momentum: float

  def inner_loss(self, logits: torch.Tensor) -> torch.Tensor:
    """Return the weighted loss [] of the training batch."""
    losses = functional.cross_entropy(logits, self.y, reduction="none")
    return torch.mean(torch.sigmoid(self.weights) * losses)

  def hypergradient(self, logits: torch.Tensor) -> torch.Tensor:
    """Differentiate the loss of the held-out batch: [B]."""
    loss = functional.cross_entropy(logits, self.held_out_y)
    return torch.autograd.grad(loss, self.weights)[0]

  def sgd(self) -> torch.optim.SGD:
    """Return an optimizer of torch for the network."""
    return torch.optim.SGD(
      self.network.parameters(), self.rate, momentum=self.momentum
    )


Run = Callable[[], torch.Tensor]  # () -> hypergradient [B]


def by_hand(problem: Problem) -> Run:
  """Unroll with torch alone; the update is fused over parameters."""
  names, start = zip(*problem.network.named_parameters(), strict=True)

  def logits(params, x):
    params = dict(zip(names, params, strict=True))
    return torch.func.functional_call(problem.network, params, (x,))

  def run():
    params, trace = start, None
    for _ in range(problem.num_steps):
      loss = problem.inner_loss(logits(params, problem.x))
      grads = torch.autograd.grad(loss, params, create_graph=True)
      trace = (
        torch._foreach_add(grads, trace, alpha=problem.momentum)
        if trace
        else grads
      )
      params = torch._foreach_add(params, trace, alpha=-problem.rate)
    return problem.hypergradient(logits(params, problem.held_out_x))

  return run


def by_torchopt(problem: Problem) -> Run:
  """Unroll with MetaSGD; its functional interface is as fast."""
  import torchopt

  network = problem.network
  optimizer = torchopt.MetaSGD(network, problem.rate, problem.momentum)
  stateful = (network, optimizer)
  starts = [torchopt.extract_state_dict(x, by="reference") for x in stateful]

  def run():
    for _ in range(problem.num_steps):
      optimizer.step(problem.inner_loss(network(problem.x)))
    slopes = problem.hypergradient(network(problem.held_out_x))
    for x, start in zip(stateful, starts, strict=True):
      torchopt.recover_state_dict(x, start)
    return slopes

  return run


def by_higher(problem: Problem) -> Run:
  """Unroll in an inner-loop context, which tracks gradients by default."""
  import higher

  optimizer = problem.sgd()

  def run():
    with higher.innerloop_ctx(problem.network, optimizer) as (network, tracked):
      for _ in range(problem.num_steps):
        tracked.step(problem.inner_loss(network(problem.x)))
      return problem.hypergradient(network(problem.held_out_x))

  return run


def by_betty(problem: Problem) -> Run:
  """Let an engine take T inner steps and one outer step.

  Betty's hypergradient types (darts, cg, neumann) are approximations. What goes
  through the steps exactly is an `IterativeProblem` below a problem with
  `first_order=False`.
  """
  from betty import configs, engine, problems

  network = problem.network
  found: list[torch.Tensor] = []

  class Outer(problems.ImplicitProblem):
    def get_batch(self):
      return problem.held_out_x, problem.held_out_y

    def training_step(self, batch):
      x, y = batch
      return functional.cross_entropy(self.inner(x), y)

    def custom_optimizer_step(self):
      found[:] = [self.module[0].grad]

  class Inner(problems.IterativeProblem):
    def forward(self, x):
      return self.fmodule(self.params, self.buffers, x)

    def get_batch(self):
      return problem.x, problem.y

    def training_step(self, batch):
      return problem.inner_loss(self(batch[0]))

    def on_inner_loop_start(self):
      # The gradient of the old first parameters would be added to.
      self.params = tuple(
        x.detach().clone().requires_grad_() for x in network.parameters()
      )
      for state in self.optimizer.state:
        state["momentum_buffer"] = None

  config = functools.partial(configs.Config, first_order=False)
  outer = Outer("outer", config(), nn.ParameterList([problem.weights]))
  inner = Inner(
    "inner",
    config(unroll_steps=problem.num_steps, retain_graph=True),
    network,
    problem.sgd(),
  )
  runner = engine.Engine(
    [outer, inner],
    configs.EngineConfig(train_iters=problem.num_steps),
    {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
  )

  def run():
    runner.run()
    return found[0]

  return run


WAYS = {
  "torch": by_hand,
  "torchopt": by_torchopt,
  "higher": by_higher,
  "betty": by_betty,
}


def load(cell: Any) -> Problem:
  """Read the problem of a cell, whose arrays are in JAX's layout."""
  arrays = np.load(cell.problem)
  network = _networks()[cell.network]
  for index, parameter in enumerate(network.parameters()):
    leaf = arrays[f"param{index}"]
    leaf = leaf.transpose(_ORDERS[leaf.ndim]).reshape(parameter.shape)
    parameter.data.copy_(torch.from_numpy(leaf))
  x, y, held_out_x, held_out_y, weights = (
    torch.from_numpy(arrays[name])
    for name in ("x", "y", "held_out_x", "held_out_y", "weights")
  )
  return Problem(
    network,
    nn.Parameter(weights),
    x,
    y.long(),
    held_out_x,
    held_out_y.long(),
    cell.num_steps,
    cell.rate,
    cell.momentum,
  )


def _networks():
  return {
    "mlp": nn.Sequential(
      nn.Linear(64, 128),
      nn.Tanh(),
      nn.Linear(128, 128),
      nn.Tanh(),
      nn.Linear(128, 10),
    ),
    "convnet": nn.Sequential(
      nn.Unflatten(1, (1, 8, 8)),
      nn.Conv2d(1, 16, 3, padding=1),
      nn.Tanh(),
      nn.Conv2d(16, 32, 3, stride=2, padding=1),
      nn.Tanh(),
      nn.Flatten(),
      nn.Linear(512, 10),
    ),
  }


def measure(cell: Any) -> dict[str, float]:
  """Measure a cell, an `inner_loops.Cell`, and save its hypergradient."""
  problem = load(cell)
  run = WAYS[cell.way](problem)
  params = tuple(problem.network.parameters())
  plain = lambda: torch.autograd.grad(
    problem.inner_loss(problem.network(problem.x)), params
  )
  plain_seconds = measuring.median_seconds(plain, cell.rounds)
  slopes, memory_bytes = measuring.peak_growth(run)
  np.save(cell.gradient, slopes.numpy())
  return {
    "seconds": measuring.median_seconds(run, cell.rounds),
    "memory_bytes": memory_bytes,
    "plain_seconds": plain_seconds,
  }


if __name__ == "__main__":
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  print(json.dumps(measure(types.SimpleNamespace(**json.loads(sys.argv[1])))))
