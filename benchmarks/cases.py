"""Iterations of the paper's setting on random images, ready to be timed."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2t_jax import data, models, types
import l2t_jax.config
from l2t_jax.data import from_arrays
from l2t_jax.run import experiments, from_config
from l2t_jax.run import setup as setups
from l2t_jax.runtime import compilation, cpu_lowering, sharding

_NUM_CLASSES, _NUM_SOURCE_CLASSES = 10, 200
# Of all images. At 32x32 they are as many as those of STL-10, so that the
# programs are those of configs/stl10.py.
_NUM_PIXELS = 4_500 * 32**2


class Setting(NamedTuple):
  """What an iteration is made of; the paper's values for 32x32 images."""

  method: str = "l2t_ww"
  mode: str = "linearized"
  num_inner_steps: int = 2
  batch_size: int = 128
  precision: str = "f32"
  pairs: str = ""  # "": the method's own.
  source: str = "resnet32"
  num_sources: int = 1
  target: str = "vgg9"
  image_size: int = 32
  num_seeds: int = 1
  rolled: bool = True
  batch_norm_groups: int = 1


class Iteration(NamedTuple):
  """A setup with what its training step starts from."""

  setup: setups.Setup
  state: types.TrainState
  batch: types.Batch


def create(setting: Setting) -> Iteration:
  """Build a run as `train.py` does, its first state and a batch."""
  cpu_lowering.install()
  config = l2t_jax.config.get_config()
  config.method, config.precision = setting.method, setting.precision
  config.batch_size = setting.batch_size
  config.data.image_size, config.data.augment = setting.image_size, "none"
  config.transfer.pairs = setting.pairs
  config.bilevel.num_inner_steps = setting.num_inner_steps
  config.bilevel.loop = "scan" if setting.rolled else "unroll"
  names = [f"source{i}" for i in range(setting.num_sources)]
  if setting.num_sources == 1:
    names = [""]
  dtype, _ = compilation.PRECISIONS[setting.precision]
  setup = setups.build(
    experiments.Experiment(
      models.create(setting.target, _NUM_CLASSES, dtype),
      _random_images(setting),
      data.DataFields(**config.data.to_dict()),
      from_config.settings(config),
      {
        name: _random_source(setting, jax.random.key(i))
        for i, name in enumerate(names, start=1)
      },
      batch_norm_groups=setting.batch_norm_groups,
    )
  )
  leading = (setting.num_seeds,) if setting.num_seeds > 1 else ()
  states = [setup.create_state(seed) for seed in range(setting.num_seeds)]
  state = states[0]
  if leading:
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  return Iteration(setup, state, _random_batch(setup, leading))


def compile_iteration(
  setting: Setting, iteration: Iteration
) -> compilation.Program:
  """Compile a step as `train.py` does; its state is donated."""
  _, precision = compilation.PRECISIONS[setting.precision]
  with jax.default_matmul_precision(precision):
    setup, state, batch = iteration
    step = setups.jit_step(
      setup, state, num_seeds=setting.num_seeds, mode=setting.mode
    )
    return compilation.compile_ahead(
      step, state, setup.scalars, setup.sources, batch
    ).result()


def compile_for(
  setting: Setting, iteration: Iteration, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
  """Compile a step for devices that need not be there."""

  def shapes(tree, how):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), tree
    )

  replicated = sharding.replicated(mesh)
  state = shapes(iteration.state, replicated)
  _, precision = compilation.PRECISIONS[setting.precision]
  with jax.default_matmul_precision(precision):
    lowered = setups.jit_step(
      iteration.setup._replace(mesh=mesh), state, mode=setting.mode
    ).lower(
      state,
      shapes(iteration.setup.scalars, replicated),
      shapes(iteration.setup.sources, replicated),
      shapes(iteration.batch, sharding.along(mesh)),
    )
  is_here = mesh.devices.flat[0].platform == jax.default_backend()
  return lowered.compile(compilation.options() if is_here else None)


def _random_images(setting):
  """Images that stand for a data set; the batches are drawn elsewhere."""
  size = (setting.image_size, setting.image_size, 3)
  count = max(setting.batch_size, _NUM_PIXELS // setting.image_size**2)
  rng, arrays = np.random.default_rng(0), {}
  for part, number in (("train", count), ("val", 1), ("test", 1)):
    arrays[f"x_{part}"] = rng.integers(0, 256, (number, *size), np.uint8)
    arrays[f"y_{part}"] = np.arange(number) % _NUM_CLASSES
  return from_arrays.image_set(arrays, "random images")


def _random_source(setting, key):
  dtype, _ = compilation.PRECISIONS[setting.precision]
  network = models.create(setting.source, _NUM_SOURCE_CLASSES, dtype)
  shape = (setting.image_size, setting.image_size, 3)
  return experiments.Source(network, *models.init(network, key, shape))


def _random_batch(setup, leading):
  rng = np.random.default_rng(0)
  images, labels, *_ = setup.blank_batch
  batch = types.Batch(
    rng.standard_normal((*leading, *images.shape)).astype(np.float32),
    rng.integers(0, _NUM_CLASSES, (*leading, *labels.shape), np.int32),
  )
  return sharding.shard(batch, setup.mesh, axis=len(leading))
