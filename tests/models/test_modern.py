"""The vision transformer and the ConvNeXt, beside PyTorch's own layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import errors, models
from l2t_jax.models import convnext, vit


def _count(module, shape):
  params, _ = jax.eval_shape(
    lambda key: models.init(module, key, shape), jax.random.key(0)
  )
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_sizes_are_those_of_the_papers():
  """At 224x224 and for 1,000 classes."""
  shape = (224, 224, 3)
  deit = vit.ViT(1000, patch_size=16)
  assert _count(deit, shape) == 5_717_416
  assert round(_count(convnext.ConvNeXt(1000), shape) / 1e6, 1) == 3.7


def _torch_params(tree):
  """Make the leaves of a tree random tensors, and the same arrays for JAX."""
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  arrays = jax.tree.map(lambda x: rng.normal(size=x.shape) / 4, tree)
  return arrays, jax.tree.map(torch.tensor, arrays)


def _load(module, tensors):
  """Load tensors by name; all of a module's, and no others."""
  module.load_state_dict(tensors, strict=True)
  return module.double().eval()


def test_a_transformer_block_is_that_of_pytorch(x64):
  torch = pytest.importorskip("torch")
  width, heads = 12, 3
  x = np.random.default_rng(1).normal(size=(2, 5, width))
  block = vit.Block(heads)
  shapes = block.init(jax.random.key(0), jnp.array(x))["params"]
  params, of = _torch_params(shapes)
  attention = of["attention"]
  in_weights = [
    attention[name]["kernel"].reshape(width, width).T
    for name in ("query", "key", "value")
  ]
  in_biases = [
    attention[name]["bias"].reshape(-1) for name in ("query", "key", "value")
  ]
  theirs = _load(
    torch.nn.TransformerEncoderLayer(
      width,
      heads,
      4 * width,
      activation="gelu",
      layer_norm_eps=1e-6,
      batch_first=True,
      norm_first=True,
    ).double(),
    {
      "self_attn.in_proj_weight": torch.cat(in_weights),
      "self_attn.in_proj_bias": torch.cat(in_biases),
      "self_attn.out_proj.weight": attention["out"]["kernel"]
      .reshape(width, width)
      .T,
      "self_attn.out_proj.bias": attention["out"]["bias"],
      "linear1.weight": of["fc1"]["kernel"].T,
      "linear1.bias": of["fc1"]["bias"],
      "linear2.weight": of["fc2"]["kernel"].T,
      "linear2.bias": of["fc2"]["bias"],
      "norm1.weight": of["norm1"]["scale"],
      "norm1.bias": of["norm1"]["bias"],
      "norm2.weight": of["norm2"]["scale"],
      "norm2.bias": of["norm2"]["bias"],
    },
  )
  with torch.no_grad():
    expected = theirs(torch.tensor(x))
  seen = block.apply({"params": params}, jnp.array(x))
  np.testing.assert_allclose(seen, expected, rtol=1e-9, atol=1e-12)


def test_a_convnext_block_is_that_of_pytorch(x64):
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  x = np.random.default_rng(1).normal(size=(2, 9, 8, 6))
  block = convnext.Block()
  shapes = block.init(jax.random.key(0), jnp.array(x))["params"]
  params, of = _torch_params(shapes)
  y = functional.conv2d(
    torch.tensor(x).permute(0, 3, 1, 2),
    of["conv"]["kernel"].permute(3, 2, 0, 1),
    of["conv"]["bias"],
    padding=3,
    groups=6,
  ).permute(0, 2, 3, 1)
  norm = of["norm"]
  y = functional.layer_norm(y, (6,), norm["scale"], norm["bias"], 1e-6)
  dense = lambda y, name: y @ of[name]["kernel"] + of[name]["bias"]
  y = dense(functional.gelu(dense(y, "fc1")), "fc2") * of["layer_scale"]
  seen = block.apply({"params": params}, jnp.array(x))
  np.testing.assert_allclose(seen, torch.tensor(x) + y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["vit_tiny", "convnext_atto"])
def test_activations_are_bf16_where_asked(name):
  module = models.create(name, 10, dtype=jnp.bfloat16)
  shape = (32, 32, 3)
  params, state = jax.eval_shape(
    lambda key: models.init(module, key, shape), jax.random.key(0)
  )
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
  logits, features, _ = jax.eval_shape(
    lambda *args: models.as_apply_fn(module)(*args, train=True),
    params,
    state,
    jax.ShapeDtypeStruct((2, *shape), jnp.float32),
  )
  for each in (logits, *features.values()):
    assert each.dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("name", "size", "divisor"), [("vit_tiny", 30, 4), ("convnext_atto", 8, 16)]
)
def test_images_that_do_not_fit(name, size, divisor):
  message = f"images are {size}x{size}; .* multiples of {divisor}"
  with pytest.raises(errors.InputError, match=message):
    models.trace(models.create(name, 10), (size, size, 3))


def test_a_transformer_has_taps_all_over_its_depth():
  module = vit.ViT(10, width=12, depth=6)
  layout = models.trace(module, (16, 16, 3))
  assert models.select_taps(layout) == dict.fromkeys(
    ("block1", "block3", "block4", "block6"), (4, 4, 12)
  )
