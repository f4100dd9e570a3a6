"""Networks of other libraries: their taps and their training."""

from collections.abc import Callable
import functools

import chex
from flax import linen as nn
from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from examples import networks as examples
from l2t_jax import errors, models
from l2t_jax.method import pair_sets, training
from l2t_jax.models import pure_functions, weight_files
from tests.support import small_setup

IMAGES = (8, 8, 3)


class LinenNet(nn.Module):
  """Batch norm, dropout, and a submodule that is called twice."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(4, (3, 3), name="stem")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    shared = nn.Conv(4, (3, 3), name="shared")
    x = shared(nn.relu(shared(x)))
    x = nn.Dropout(0.5, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
    return nn.Dense(5, name="head")(x)


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.head = nnx.Linear(4, 5, rngs=rngs)

  def __call__(self, x):
    x = jnp.mean(self.norm(self.stem(x)), axis=(1, 2))
    return self.head(self.dropout(x))


def init_by_hand(key):
  kernel = jax.random.normal(key, (3, 4))
  return {"kernel": kernel, "head": jnp.ones((4, 5))}, {}


def apply_by_hand(params, model_state, images, *, train):
  x = images @ params["kernel"]
  features = {"late": x[:, ::2, ::2], "early": x, "mean": x.mean((1, 2))}
  return features["mean"] @ params["head"], features, model_state


BY_HAND = models.Functions(init_by_hand, apply_by_hand)


@pytest.mark.parametrize("network", [LinenNet(), NnxNet], ids=["linen", "nnx"])
def test_training_and_evaluation(network):
  key, images = (
    jax.random.key(0),
    jax.random.normal(jax.random.key(1), (4, *IMAGES)),
  )
  params, state = models.init(network, key, IMAGES)
  assert set(params) >= {"stem", "norm", "head"}
  apply_fn = models.as_apply_fn(network, ("stem",))
  logits, features, same = apply_fn(params, state, images, train=False)
  assert logits.shape == (4, 5)
  assert {name: x.shape for name, x in features.items()} == {
    "stem": (4, 8, 8, 4)
  }
  chex.assert_trees_all_equal(same, state)
  first, _, after = apply_fn(params, state, images, train=True)
  chex.assert_trees_all_equal_structs(after, state)
  # Statistics and the key of dropout change from step to step.
  for new, old in zip(*map(jax.tree.leaves, (after, state)), strict=True):
    if new.size > 2 or new.dtype != jnp.uint32:
      assert bool((new != old).any())
  statistics = lambda tree: {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(tree).items()
    if leaf.dtype != jnp.uint32
  }
  keys_only = traverse_util.unflatten_dict(
    traverse_util.flatten_dict(after) | statistics(state)
  )
  second, *_ = apply_fn(params, keys_only, images, train=True)
  assert float(jnp.abs(first - second).max()) > 1e-3


@pytest.mark.parametrize("network", [LinenNet(), NnxNet], ids=["linen", "nnx"])
def test_groups_are_normalised_separately(network):
  params, state = models.init(network, jax.random.key(0), IMAGES)
  images = jax.random.normal(jax.random.key(1), (6, *IMAGES))
  grouped = models.as_apply_fn(network, ("norm",), batch_norm_groups=2)
  alone = models.as_apply_fn(network, ("norm",))
  logits, features, after = grouped(params, state, images, train=True)
  halves = [
    alone(params, state, half, train=True) for half in (images[:3], images[3:])
  ]
  expected = jnp.concatenate([half[1]["norm"] for half in halves])
  np.testing.assert_allclose(features["norm"], expected, rtol=1e-5, atol=1e-5)
  assert logits.shape == (6, 5)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  statistics = lambda tree: {
    path: leaf
    for path, leaf in traverse_util.flatten_dict(tree).items()
    if leaf.dtype != jnp.uint32
  }
  means = jax.tree.map(
    lambda *both: sum(both) / 2, *(statistics(half[2]) for half in halves)
  )
  assert len(means) == 2
  chex.assert_trees_all_close(statistics(after), means, rtol=1e-5)
  chex.assert_trees_all_equal(
    grouped(params, state, images, train=False),
    alone(params, state, images, train=False),
  )


class NnxScanned(nnx.Module):
  """Two layers with a stream of dropout each."""

  def __init__(self, rngs):
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make_layers(rngs):
      return nnx.Dropout(0.5, rngs=rngs)

    self.layers = make_layers(rngs)
    self.head = nnx.Linear(3, 5, rngs=rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
      return layer(x)

    return self.head(jnp.mean(run(x, self.layers), axis=(1, 2)))


def test_a_batch_that_cannot_be_split_into_groups():
  params, state = models.init(LinenNet(), jax.random.key(0), IMAGES)
  apply_fn = models.as_apply_fn(LinenNet(), (), batch_norm_groups=4)
  with pytest.raises(
    errors.InputError, match="6 images cannot be split into 4"
  ):
    apply_fn(params, state, jnp.zeros((6, *IMAGES)), train=True)


@pytest.mark.parametrize(
  "network",
  [LinenNet(), NnxNet, NnxScanned],
  ids=["linen", "nnx", "nnx_scanned"],
)
def test_each_group_has_its_own_dropout(network):
  params, state = models.init(network, jax.random.key(0), IMAGES)
  half = jax.random.normal(jax.random.key(1), (3, *IMAGES))
  grouped = models.as_apply_fn(network, (), batch_norm_groups=2)
  twins = jnp.concatenate([half, half])
  first, _, after = grouped(params, state, twins, train=True)
  assert float(jnp.abs(first[:3] - first[3:]).max()) > 1e-3
  second, *_ = grouped(params, after, twins, train=True)
  for again in (second[:3], second[3:]):
    for before in (first[:3], first[3:]):
      assert float(jnp.abs(again - before).max()) > 1e-3


class Wrapped(nn.Module):
  """Passes its arguments on without naming them."""

  @nn.compact
  def __call__(self, x, **options):
    return LinenNet(name="net")(x, **{"train": False} | options)


class WithAttribute(nn.Module):
  train: bool = False

  @nn.compact
  def __call__(self, x):
    return LinenNet(name="net")(x, train=self.train)


class NnxFrozen(NnxNet):
  def __call__(self, x):
    x = self.norm(self.stem(x), use_running_average=True)
    return self.head(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize("network", [Wrapped(), WithAttribute(), NnxFrozen])
def test_networks_that_do_not_know_when_they_train_say_so(network):
  (note,) = models.training_notes(network, models.trace(network, IMAGES), 4)
  assert "does not update the target's batch statistics" in note


@pytest.mark.parametrize("network", [LinenNet(), NnxNet, BY_HAND])
def test_networks_that_know_it_say_nothing(network):
  assert not models.training_notes(network, models.trace(network, IMAGES), 4)


def test_networks_are_told_in_their_own_words():
  def call(x, training, deterministic, use_running_average):
    del x, training, deterministic, use_running_average

  for train in (False, True):
    assert pure_functions.mode_arguments(call, train) == {
      "training": train,
      "deterministic": not train,
      "use_running_average": not train,
    }


class IsTrain(nn.Module):
  @nn.compact
  def __call__(self, x, is_train):
    return LinenNet(name="net")(x, train=is_train)


class Inference(nnx.Module):
  def __init__(self, rngs):
    self.net = NnxNet(rngs)

  def __call__(self, x, *, inference):
    x = self.net.norm(self.net.stem(x), use_running_average=inference)
    return self.net.head(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize("network", [IsTrain(), Inference])
def test_other_words_for_training(network):
  layout = models.trace(network, IMAGES)
  assert not models.training_notes(network, layout, 4)


class NeedsPhase(nn.Module):
  @nn.compact
  def __call__(self, x, phase):
    return LinenNet(name="net")(x, train=phase == "train")


class NamedAxis(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
    return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))


class NoisyInEval(nn.Module):
  @nn.compact
  def __call__(self, x, is_eval=False):
    x = nn.Dropout(0.5, deterministic=is_eval)(jnp.mean(x, axis=(1, 2)))
    return nn.Dense(5)(x)


class NnxTold(NnxNet):
  def __call__(self, x, is_eval=False):
    x = self.norm(self.stem(x), use_running_average=is_eval)
    return self.head(jnp.mean(x, axis=(1, 2)))


class NnxNoisy(NnxNet):
  def __call__(self, x):
    x = self.dropout(jnp.mean(self.stem(x), axis=(1, 2)), deterministic=False)
    return self.head(x)


class NnxNamedAxis(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(3, axis_name="devices", rngs=rngs)
    self.head = nnx.Linear(3, 5, rngs=rngs)

  def __call__(self, x):
    x = self.norm(x, use_running_average=False)
    return self.head(jnp.mean(x, axis=(1, 2)))


class LinenInNnx(nnx.Module):
  def __init__(self, rngs):
    linen = nnx.bridge.ToNNX(nn.Conv(4, (3, 3)), rngs=rngs)
    self.stem = linen.lazy_init(jnp.zeros((1, *IMAGES)))
    self.head = nnx.Linear(4, 5, rngs=rngs)

  def __call__(self, x):
    return self.head(jnp.mean(self.stem(x), axis=(1, 2)))


@pytest.mark.parametrize(
  ("network", "message"),
  [
    (NeedsPhase(), "needs the argument 'phase', besides images; give it a"),
    (NamedAxis(), "axis name: batch.* leave out its axis_name"),
    (NnxNamedAxis, "axis name: devices.* leave out its axis_name"),
    (NoisyInEval(), "draws random numbers, in eval mode"),
    (NnxTold, "also changes its state, .* in eval mode"),
    (NnxNoisy, "draws random numbers, in eval mode"),
    (LinenInNnx, r"stem is a Linen module inside NNX \(nnx.bridge.ToNNX\)"),
  ],
)
def test_networks_that_need_a_change(network, message):
  with pytest.raises(errors.InputError, match=message):
    models.trace(network, IMAGES)


def test_networks_that_always_train():
  with pytest.raises(
    errors.InputError, match=r"in eval mode.*arguments train,"
  ):
    models.trace(WithAttribute(train=True), IMAGES)


def test_taps_are_listed_in_the_order_of_computation():
  assert models.trace(LinenNet(), IMAGES).taps == {
    name: (8, 8, 4) for name in ("stem", "norm", "shared", "shared#1")
  }
  assert models.trace(NnxNet, IMAGES).taps == {
    name: (8, 8, 4) for name in ("stem", "norm")
  }
  assert models.trace(BY_HAND, IMAGES).taps == {
    "early": (8, 8, 4),
    "late": (4, 4, 4),
  }


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + nn.Conv(3, (1, 1), name="b")(nn.Conv(3, (1, 1), name="c")(x))


class Wrapped(nn.Module):
  """Blocks under a transformation, which becomes one equation each."""

  transform: Callable

  @nn.compact
  def __call__(self, x):
    for index in range(11):
      x = self.transform(Block)(name=f"{index}")(x)
    return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.c = nnx.Conv(3, 3, (1, 1), rngs=rngs)
    self.b = nnx.Conv(3, 3, (1, 1), rngs=rngs)

  def __call__(self, x):
    return x + self.b(self.c(x))


class NnxNormBlock(NnxBlock):
  """Its state enters and leaves a transformation unchanged in eval mode."""

  def __init__(self, rngs):
    super().__init__(rngs)
    self.norm = nnx.BatchNorm(3, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return self.dropout(self.norm(super().__call__(x)))


class ScannedNnx(nnx.Module):
  def __init__(self, rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
      return NnxNormBlock(rngs)

    self.blocks = make(rngs)
    self.head = nnx.Linear(3, 5, rngs=rngs)

  def __call__(self, x):
    run = nnx.scan(
      lambda x, block: nnx.remat(lambda block, x: block(x))(block, x),
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )
    return self.head(jnp.mean(run(x, self.blocks), axis=(1, 2)))


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat, None])
def test_state_may_pass_through_transformations_in_eval_mode(transform):
  class Network(WrappedNnx):
    kind = NnxNormBlock

  network = ScannedNnx
  if transform:
    network = functools.partial(Network, transform=transform)
  layout = models.trace(network, IMAGES)
  assert not models.training_notes(network, layout, 4)


class WrappedNnx(nnx.Module):
  kind = NnxBlock

  def __init__(self, rngs, transform):
    self.blocks = nnx.List(self.kind(rngs) for _ in range(11))
    self.head = nnx.Linear(3, 5, rngs=rngs)
    self.transform = transform

  def __call__(self, x):
    for block in self.blocks:
      x = self.transform(lambda block, x: block(x))(block, x)
    return self.head(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize(
  ("network", "of_block"),
  [
    *((Wrapped(one), "{0}/c {0}/b {0}") for one in (nn.remat, nn.jit)),
    *(
      (
        functools.partial(WrappedNnx, transform=one),
        "blocks/{0}/c blocks/{0}/b blocks/{0}",
      )
      for one in (nnx.remat, nnx.jit)
    ),
  ],
)
def test_the_order_of_computation_within_transformations(network, of_block):
  expected = [n for i in range(11) for n in of_block.format(i).split()]
  assert list(models.trace(network, IMAGES).taps) == expected


def test_the_order_of_computation_within_jit():
  @jax.jit
  def run(params, images):
    x = images @ params["kernel"]
    features = {"stem": x, "block": jnp.sin(x), "again": x}
    return jnp.sum(x, axis=(1, 2)), features

  def apply(params, model_state, images, *, train):
    return *run(params, images), model_state

  network = models.Functions(init_by_hand, apply)
  assert list(models.trace(network, IMAGES).taps)[-1] == "block"


class Pyramid(nn.Module):
  @nn.compact
  def __call__(self, x):
    p1 = nn.Conv(4, (3, 3), name="conv")(x)
    return {"p1": p1, "p2": p1[:, ::2, ::2]}


class OnPyramid(nn.Module):
  @nn.compact
  def __call__(self, x):
    maps = Pyramid(name="backbone")(x)
    return nn.Dense(5, name="head")(jnp.mean(maps["p2"], axis=(1, 2)))


def test_maps_that_a_submodule_returns_in_a_dict():
  params, state = models.init(OnPyramid(), jax.random.key(0), IMAGES)
  images = jax.random.normal(jax.random.key(1), (2, *IMAGES))
  _, every, _ = models.as_apply_fn(OnPyramid())(
    params, state, images, train=False
  )
  for tap in ("backbone/p1", "backbone/p2", "backbone/conv"):
    _, features, _ = models.as_apply_fn(OnPyramid(), [tap])(
      params, state, images, train=False
    )
    chex.assert_trees_all_equal(features, {tap: every[tap]})


class WithDefault(NnxNet):
  @property
  def default_taps(self):
    return ("norm",)


@pytest.mark.parametrize(
  "network",
  [WithDefault, WithDefault(nnx.Rngs(0)), lambda rngs: WithDefault(rngs)],
)
def test_default_taps_of_nnx_modules(network):
  assert list(models.select_taps(models.trace(network, IMAGES))) == ["norm"]


def test_nnx_modules_that_exist_keep_their_values():
  module = NnxNet(nnx.Rngs(7))
  params, state = models.init(module, jax.random.key(0), IMAGES)
  np.testing.assert_array_equal(
    params["stem"]["kernel"], module.stem.kernel[...]
  )
  images = jax.random.normal(jax.random.key(1), (4, *IMAGES))
  logits, *_ = models.as_apply_fn(module)(params, state, images, train=False)
  module.eval()
  np.testing.assert_allclose(logits, module(images), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
  """With one head, [N, heads] looks like a map; one token is a class token."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (2, 2), strides=2, name="patches")(x).reshape(len(x), -1, 4)
    x = jnp.concatenate([x[:, :1], x], axis=1)
    attention = nn.MultiHeadDotProductAttention(num_heads=1, name="attention")
    return nn.Dense(5)(attention(x, x)[:, 0])


def test_the_heads_of_attention_are_no_maps():
  layout = models.trace(Attention(), IMAGES)
  assert set(layout.taps) == {"patches", "attention", "attention/out"}
  assert set(layout.taps.values()) == {(4, 4, 4)}


class WithConstants(nnx.Module):
  """Arrays that are not variables: of JAX, of NumPy, random, and in a list."""

  def __init__(self, rngs):
    self.head = nnx.Linear(3, 5, rngs=rngs)
    self.scale = jnp.full(3, 2.0)
    self.shift = np.ones(3, np.float32)
    self.drawn = nnx.List([jax.random.normal(rngs.params(), (3,))])

  def __call__(self, x):
    x = x * self.scale + self.shift
    return self.head(self.drawn[0] * jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize("exists", [False, True])
def test_arrays_of_nnx_modules_are_constants(exists):
  module = WithConstants(nnx.Rngs(0))
  network = module if exists else WithConstants
  layout = models.trace(network, IMAGES)
  params, state = models.init(network, jax.random.key(0), IMAGES)
  chex.assert_trees_all_equal_shapes(
    layout.variables, {"params": params, **state}
  )
  assert set(params) == {"head"}
  assert set(state) == {"scale", "shift", "drawn"}
  images = jax.random.normal(jax.random.key(1), (4, *IMAGES))
  apply_fn = models.as_apply_fn(network)
  logits, _, after = apply_fn(params, state, images, train=True)
  chex.assert_trees_all_equal(after, state)
  if exists:
    np.testing.assert_allclose(logits, module(images), rtol=1e-5)
  changed, *_ = apply_fn(
    params, state | {"scale": jnp.zeros(3)}, images, train=True
  )
  assert (changed != logits).any()


@pytest.mark.parametrize("class_token", [False, True])
def test_tokens_become_maps(class_token):
  tokens = jnp.arange(16.0).reshape(1, 16, 1)

  def apply(params, state, images, *, train):
    del params, train
    first = jnp.full((1, int(class_token), 1), -1.0)
    every = jnp.concatenate([first, tokens], axis=1)
    features = {"tokens": jnp.tile(every, (len(images), 1, 1))}
    return jnp.zeros((len(images), 5)), features, state

  network = models.Functions(lambda key: ({}, {}), apply)
  assert models.trace(network, IMAGES).taps == {"tokens": (4, 4, 1)}
  images = jnp.zeros((1, *IMAGES))
  _, features, _ = models.as_apply_fn(network)({}, {}, images, train=False)
  np.testing.assert_array_equal(
    features["tokens"][0, :, :, 0], tokens.reshape(4, 4)
  )


@pytest.mark.parametrize(("num_prefix", "width"), [(1, 8), (5, 8), (1, 4)])
def test_tokens_lie_on_the_map_of_patches(num_prefix, width):
  """With a class and four register tokens, 9 would be 3x3.

  There may be as many channels as patches.
  """

  class Transformer(nn.Module):
    @nn.compact
    def __call__(self, images):
      patches = nn.Conv(width, (4, 4), 4, name="patches")(images)
      tokens = patches.reshape(len(images), -1, width)
      prefix = jnp.full((len(images), num_prefix, width), -1.0)
      tokens = jnp.concatenate([prefix, tokens], axis=1)
      tokens = nn.LayerNorm(name="norm")(tokens)
      return nn.Dense(5)(tokens[:, 0])

  network = Transformer()
  shape = (8, 8, 3)
  assert models.trace(network, shape).taps == {
    "patches": (2, 2, width),
    "norm": (2, 2, width),
  }
  params, state = models.init(network, jax.random.key(0), shape)
  images = jax.random.normal(jax.random.key(1), (2, *shape))
  features = models.as_apply_fn(network, ["norm"])(
    params, state, images, train=False
  )[1]
  everything = models.as_apply_fn(network)(params, state, images, train=False)
  patches = everything[1]["patches"]
  expected = nn.LayerNorm().apply({"params": params["norm"]}, patches)
  np.testing.assert_allclose(features["norm"], expected, rtol=1e-4, atol=1e-5)


class ScannedBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), None


class LinenScan(nn.Module):
  """A scan, jitted, in a module of its own; and another one."""

  @nn.compact
  def __call__(self, x):
    def scan(length, name):
      return nn.scan(
        ScannedBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
      )(name=name)

    class Encoder(nn.Module):
      @nn.compact
      def __call__(self, x):
        return scan(3, "layers")(x, None)[0]

    x = nn.Conv(4, (3, 3), name="stem")(x)
    x = nn.jit(Encoder)(name="encoder")(x)
    x = scan(2, "late")(nn.max_pool(x, (2, 2), (2, 2)), None)[0]
    return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


class NnxScan(nnx.Module):
  def __init__(self, rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_blocks(rngs):
      return nnx.Conv(3, 3, (3, 3), rngs=rngs)

    self.blocks = make_blocks(rngs)
    self.head = nnx.Linear(3, 5, rngs=rngs)

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, block):
      return nnx.relu(block(x))

    return self.head(jnp.mean(run(x, self.blocks), axis=(1, 2)))


def test_scanned_layers_are_taps_in_linen():
  network = LinenScan()
  layout = models.trace(network, IMAGES)
  assert layout.taps == {
    "stem": (8, 8, 4),
    **{f"encoder/scan/{i}": (8, 8, 4) for i in range(3)},
    "encoder": (8, 8, 4),
    "scan/0": (4, 4, 4),
    "scan/1": (4, 4, 4),
  }
  params, state = models.init(network, jax.random.key(0), IMAGES)
  images = jax.random.normal(jax.random.key(1), (4, *IMAGES))
  run = models.as_apply_fn(network, ["encoder/scan/1", "scan/1"])
  logits, features, _ = run(params, state, images, train=False)
  np.testing.assert_allclose(
    logits, network.apply({"params": params}, images), rtol=1e-5, atol=1e-6
  )
  x = nn.Conv(4, (3, 3)).apply({"params": params["stem"]}, images)
  for i in range(2):
    layer = {
      name: leaf[i]
      for name, leaf in params["encoder"]["layers"]["conv"].items()
    }
    x, _ = ScannedBlock().apply({"params": {"conv": layer}}, x, None)
  np.testing.assert_allclose(
    features["encoder/scan/1"], x, rtol=1e-5, atol=1e-6
  )
  assert features["scan/1"].shape == (4, 4, 4, 4)

  def loss(params):
    _, features, _ = run(params, state, images, train=True)
    return jnp.sum(features["encoder/scan/1"] ** 2)

  kernels = jax.grad(loss)(params)["encoder"]["layers"]["conv"]["kernel"]
  # The last layer comes after the tap.
  assert [bool(jnp.any(kernel)) for kernel in kernels] == [True, True, False]


def test_scanned_layers_are_taps_in_nnx():
  module = NnxScan(nnx.Rngs(0))
  layout = models.trace(module, IMAGES)
  assert list(models.select_taps(layout)) == ["scan/0", "scan/1", "scan/2"]
  params, state = models.init(module, jax.random.key(0), IMAGES)
  images = jax.random.normal(jax.random.key(1), (4, *IMAGES))
  run = models.as_apply_fn(module, ["scan/0"])
  logits, features, _ = run(params, state, images, train=False)
  np.testing.assert_allclose(logits, module(images), rtol=1e-5, atol=1e-6)
  kernel, bias = (params["blocks"][name][0] for name in ("kernel", "bias"))
  first = nn.Conv(3, (3, 3)).apply(
    {"params": {"kernel": kernel, "bias": bias}}, images
  )
  np.testing.assert_allclose(
    features["scan/0"], nn.relu(first), rtol=1e-5, atol=1e-6
  )


def test_scans_are_found_inside_remat():
  class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
      layers = nn.scan(
        ScannedBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
      )
      return layers(name="layers")(x, None)[0]

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3, 3), name="stem")(x)
      x = nn.remat(Encoder)(name="encoder")(x)
      return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))

  network = Network()
  taps = ["encoder/scan/0", "encoder/scan/1"]
  assert list(models.select_taps(models.trace(network, IMAGES))) == taps
  params, state = models.init(network, jax.random.key(0), IMAGES)
  images = jax.random.normal(jax.random.key(1), (2, *IMAGES))
  run = models.as_apply_fn(network, [*taps, "encoder"])

  def loss(params):
    logits, features, _ = run(params, state, images, train=True)
    return jnp.sum(features["encoder/scan/1"] ** 2), (logits, features)

  grads, (logits, features) = jax.grad(loss, has_aux=True)(params)
  np.testing.assert_allclose(
    logits, network.apply({"params": params}, images), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_array_equal(features["encoder/scan/1"], features["encoder"])
  assert bool(jnp.any(grads["stem"]["kernel"]))


def test_transposed_tokens_are_no_map():
  """The MLP-Mixer mixes tokens in [B, C, N]; here C is a square number."""

  class Mixer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
      x = nn.Conv(self.width, (2, 2), strides=2, name="patches")(x)
      x = x.reshape(len(x), -1, self.width)
      y = nn.Dense(16, name="mixing")(jnp.swapaxes(x, 1, 2))
      x += jnp.swapaxes(y, 1, 2)
      return nn.Dense(5, name="head")(x.mean(1))

  for width in (9, 64):
    layout = models.trace(Mixer(width), IMAGES)
    assert layout.taps == {"patches": (4, 4, width)}


def test_loops_may_be_nested_reversed_and_repeated():
  """And what is no layer: a carry without an axis of images."""

  def apply(params, state, images, *, train):
    del params, train
    double = lambda x, _: (2 * x, jnp.sum(x))
    reverse = lambda x, i: (x + i, None)
    x, sums = jax.lax.scan(double, images, length=2)
    steps = jnp.arange(3.0)
    x, _ = jax.lax.scan(reverse, x, steps, reverse=True)
    jax.lax.scan(lambda c, _: (c + 1, None), jnp.zeros((1, 2, 2)), length=2)
    x = jax.jit(lambda x: jax.lax.scan(double, x, length=1)[0])(x)
    return x.mean((1, 2)) + jnp.sum(sums), {"out": x}, state

  network = models.Functions(lambda key: ({}, {}), apply)
  layout = models.trace(network, IMAGES)
  assert list(layout.taps) == [
    *(f"scan/{i}" for i in range(2)),
    *(f"scan#1/{i}" for i in range(3)),
    *("scan#3/0", "out"),
  ]
  assert (
    "'scan#2/0' cannot be tapped: its shape is [1, 2, 2] for 2"
    in (layout.untappable["scan#2/0"])
  )
  images = jax.random.normal(jax.random.key(1), (2, *IMAGES))
  _, features, _ = models.as_apply_fn(network)({}, {}, images, train=False)
  np.testing.assert_allclose(features["scan/1"], 4 * images, rtol=1e-6)
  # From the last step to the first.
  np.testing.assert_allclose(features["scan#1/0"], 4 * images + 2, rtol=1e-6)
  np.testing.assert_allclose(features["scan#1/2"], 4 * images + 3, rtol=1e-6)
  np.testing.assert_allclose(features["out"], 8 * images + 6, rtol=1e-6)


def test_nested_features_and_outputs_that_are_tuples():
  class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(4, name="out")(x), {"weights": x[..., :1]}

  class Nested(nn.Module):
    returns_features: bool

    @nn.compact
    def __call__(self, x):
      y, _ = Attention(name="attention")(x)
      windows = nn.Dense(4, name="windows")(y.reshape(-1, 4, 4, 4))
      logits = nn.Dense(5, name="head")(windows.mean() + y.mean((1, 2)))
      features = {"encoder": {"blocks": [x, y]}, "logits": logits}
      return (logits, features) if self.returns_features else logits

  layout = models.trace(Nested(returns_features=True), IMAGES)
  assert list(layout.taps) == ["encoder/blocks/0", "encoder/blocks/1"]
  assert list(layout.untappable) == ["logits"]
  layout = models.trace(Nested(returns_features=False), IMAGES)
  assert list(layout.taps) == ["attention/out", "attention"]
  assert "[8, 4, 4, 4] for 2 images" in layout.untappable["windows"]


@pytest.mark.parametrize(
  ("network", "patterns", "expected"),
  [
    (examples.ConvNeXt(5), (), ("stage0_0", "stage1_0")),
    (examples.ConvNeXt(5), ("stage*",), ("stage0_0", "stage1_0", "stage2_0")),
    (
      examples.ConvNeXt(5),
      ("*/Conv_?",),
      tuple(f"stage{i}_0/Conv_0" for i in range(3)),
    ),
    (examples.ConvNeXt(5), ("**1_0**", "down0"), None),
    (examples.ViT(5, patch_size=2), (), tuple(f"block_{i}" for i in range(4))),
    (
      examples.ViT(5, patch_size=2, depth=6),
      (),
      tuple(f"block_{i}" for i in (0, 2, 3, 5)),
    ),
    (LinenNet(), (), ("shared", "shared#1")),
    (small_setup.TARGET, (), small_setup.TARGET.default_taps),
  ],
)
def test_taps_by_glob_and_by_default(network, patterns, expected):
  chosen = tuple(models.select_taps(models.trace(network, IMAGES), patterns))
  if expected is None:
    assert chosen[0] == "down0" and chosen[-1] == "stage1_0" and len(chosen) > 3
  else:
    assert chosen == expected


@pytest.mark.parametrize(
  ("network", "pattern", "message"),
  [
    (examples.ConvNeXt(5), "stag_*", "unknown tap 'stag_.'.*stage0_0"),
    (
      examples.ConvNeXt(5),
      "head",
      r"'head' cannot be tapped: its shape is \['B', 5\], neither",
    ),
    (BY_HAND, "mean", r"'mean' cannot be tapped: its shape is \['B', 4\]"),
  ],
)
def test_taps_that_cannot_be(network, pattern, message):
  with pytest.raises(errors.InputError, match=message):
    models.select_taps(models.trace(network, IMAGES), (pattern,))


@pytest.mark.parametrize(
  ("name", "dtype", "message"),
  [
    ("no_such.module:make", None, "cannot import.*no_such"),
    ("examples.networks:convnet", None, "cannot import.*convnet"),
    ("examples.networks:vit", jnp.bfloat16, "no argument dtype.*precision f32"),
  ],
)
def test_models_of_ones_own_that_cannot_be(name, dtype, message):
  with pytest.raises(errors.InputError, match=message):
    models.create(name, 5, dtype)


def test_what_is_no_network():
  with pytest.raises(errors.InputError, match="is not a network"):
    models.trace("resnet32", IMAGES)
  with pytest.raises(errors.InputError, match="returns a dict; it must return"):
    models.trace(nn.Sequential([lambda x: {"x": x}]), IMAGES)
  with pytest.raises(errors.InputError, match="no layer that could be tapped"):
    network = nn.Sequential([lambda x: x.mean((1, 2))])
    models.select_taps(models.trace(network, IMAGES))


def with_variables(params, model_state):
  """Return a network that reads none of its variables."""
  return models.Functions(
    lambda key: (params, model_state),
    lambda params, model_state, images, *, train: (
      images.mean((1, 2)), {}, model_state
    ),
  )  # fmt: skip


@pytest.mark.parametrize(
  ("params", "model_state", "name"),
  [
    ((np.ones(3), np.ones(2)), {}, r"params\[0\]"),
    ([np.ones(3), np.ones(3)], {}, r"params\[0\]"),
    (np.ones(3), {}, "params"),
    ({"head": {1: np.ones(3)}}, {}, r"params\['head'\]\[1\]"),
    ({"head/bias": np.ones(3)}, {}, r"params\['head/bias'\]"),
    ({"kind": "linear"}, {}, r"params\['kind'\]"),
    ({}, {"key": jax.random.key(0)}, r"model_state\['key'\]"),
  ],
)
def test_variables_that_cannot_be_saved(params, model_state, name):
  network = with_variables(params, model_state)
  with pytest.raises(errors.InputError, match=f"{name} cannot be saved"):
    models.trace(network, IMAGES)


@pytest.mark.parametrize("nothing", [None, ()])
def test_a_network_without_a_state(nothing):
  network = with_variables({"scale": 1.0}, nothing)
  assert set(models.trace(network, IMAGES).variables) == {"params"}
  params, model_state = models.init(network, jax.random.key(0), IMAGES)
  assert model_state == {}
  *_, model_state = models.as_apply_fn(network)(
    params, nothing, jnp.zeros((2, *IMAGES)), train=True
  )
  assert model_state == {}


def test_linen_modules_may_name_axes(tmp_path):
  kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
  network = nn.Sequential(
    [lambda x: x.mean((1, 2)), nn.Dense(5, kernel_init=kernel_init)]
  )
  params, state = models.init(network, jax.random.key(0), IMAGES)
  images = jnp.ones((2, *IMAGES))
  logits, *_ = models.as_apply_fn(network)(params, state, images, train=True)
  np.testing.assert_allclose(logits, 3)
  weight_files.save(tmp_path / "weights.safetensors", {"params": params}, {})
  layout = models.trace(network, IMAGES)
  chex.assert_trees_all_equal_shapes(layout.variables, {"params": params})


def as_nnx(params):
  """Names of ConvNeXt's parameters in Linen -> those in NNX."""
  parts = {"Conv_0": "conv", "LayerNorm_0": "norm", "Dense_0": "widen"}
  renamed = {}
  for (module, *rest), leaf in traverse_util.flatten_dict(params).items():
    if module.startswith("down"):
      path = ("downs", module[-1], *rest)
    elif module.startswith("stage"):
      stage, block = module.removeprefix("stage").split("_")
      part = parts.get(rest[0], "narrow")
      path = ("stages", stage, "layers", block, part, *rest[1:])
    else:
      path = (module, *rest)
    renamed[path] = leaf
  return traverse_util.unflatten_dict(renamed)


@pytest.mark.long
def test_linen_and_nnx_train_alike(x64):
  linen = examples.ConvNeXt(small_setup.NUM_CLASSES)
  make_nnx = functools.partial(
    examples.NnxConvNeXt, small_setup.NUM_CLASSES, IMAGES[-1]
  )
  nnx_network = lambda rngs: make_nnx(rngs=rngs)
  params, _ = models.init(linen, jax.random.key(0), IMAGES)
  rename = lambda name: name.replace("stage0_0", "stages/0").replace(
    "stage1_0", "stages/1"
  )
  state, sources, pairs, target_taps = small_setup.create(target=linen)
  results = []
  for network, change, to_params in (
    (linen, lambda name: name, lambda params: params),
    (nnx_network, rename, as_nnx),
  ):
    taps = {change(name): shape for name, shape in target_taps.items()}
    assert taps == models.select_taps(models.trace(network, IMAGES))
    renamed = lambda by_pair, change=change: {
      change(name): value for name, value in by_pair.items()
    }
    inner_params = {
      "target": to_params(params),
      "regressors": renamed(state.inner.params["regressors"]),
    }
    start = training.create_state(
      inner_params,
      {},
      {kind: renamed(layers) for kind, layers in state.meta_params.items()},
      small_setup.RECIPE,
    )
    step = small_setup.make_train_step(
      "l2t_ww",
      tuple(pair_sets.Pair(p.source, change(p.target)) for p in pairs),
      taps,
      target=network,
    )
    after, metrics = jax.jit(step)(start, sources, small_setup.batch(4))
    results.append((after, metrics))
  (linen_state, linen_metrics), (nnx_state, nnx_metrics) = results
  scalars = lambda metrics: {
    k: v for k, v in metrics.items() if k != "transfer"
  }
  chex.assert_trees_all_close(
    scalars(linen_metrics), scalars(nnx_metrics), rtol=1e-9
  )
  chex.assert_trees_all_close(
    as_nnx(linen_state.inner.params["target"]),
    nnx_state.inner.params["target"],
    rtol=1e-9,
    atol=1e-12,
  )
  moments = lambda state: [
    leaf
    for _, leaf in sorted(
      (rename(jax.tree_util.keystr(path)), leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        state.meta_opt_state
      )
    )
  ]
  # Adam's first moment is the hypergradient times a constant.
  chex.assert_trees_all_close(
    moments(linen_state), moments(nnx_state), rtol=1e-9, atol=1e-15
  )


class Unusual(nn.Module):
  """A scalar parameter, random numbers of its own, and a sown loss."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(4, (3, 3), name="stem")(x)
    x *= self.param("temperature", nn.initializers.ones, ())
    self.sow("losses", "square", jnp.mean(x**2))
    if train:
      keep = jax.random.bernoulli(self.make_rng("drop_path"), 0.5, x.shape[:1])
      x *= keep[:, None, None, None]
    return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def test_unusual_modules_train_and_are_read_again(tmp_path):
  network = Unusual()
  params, state = models.init(network, jax.random.key(0), IMAGES)
  assert set(state) == {"rng"}
  apply_fn = models.as_apply_fn(network)
  images = jax.random.normal(jax.random.key(1), (8, *IMAGES))
  for _ in range(3):
    _, _, state = apply_fn(params, state, images, train=True)
  path = tmp_path / "weights.safetensors"
  weight_files.save(path, {"params": params, **state}, {})
  variables = traverse_util.unflatten_dict(
    safetensors.numpy.load_file(path), sep="/"
  )
  layout = models.trace(network, IMAGES)
  weight_files.check_shapes(layout, variables, "it")
  chex.assert_trees_all_equal(variables, {"params": params, **state})
  del variables["params"]["temperature"]
  with pytest.raises(
    errors.InputError, match=r"it on .*temperature is missing, expected \[\]"
  ):
    weight_files.check_shapes(layout, variables, "it")
