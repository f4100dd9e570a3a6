"""Networks of torch that no library of pre-trained networks has."""

import torch
from torch import nn


class Block(nn.Module):
  """A residual block."""

  def __init__(self, inputs, outputs, stride):
    super().__init__()
    self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
    self.norm = nn.BatchNorm2d(outputs)
    self.skip = nn.Conv2d(inputs, outputs, 1, stride)

  def forward(self, x):
    return torch.relu(self.norm(self.conv(x)) + self.skip(x))


class LastNorm(nn.Module):
  """A norm with channels last, as in ConvNeXt."""

  def __init__(self, width):
    super().__init__()
    self.norm = nn.LayerNorm(width)

  def forward(self, x):
    return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Convolutional(nn.Module):
  """A network for images of any size. Its last maps have as many channels as
  rows and columns at 16x16."""

  def __init__(self, num_classes=5):
    super().__init__()
    self.stem = nn.Conv2d(3, 6, 3, 1, 1)
    self.blocks = nn.Sequential(Block(6, 8, 2), Block(8, 4, 2))
    self.last = LastNorm(4)
    self.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()

  def forward(self, x):
    return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


class Transformer(nn.Module):
  """A vision transformer with a class token and two register tokens, which
  takes images of 8x8 alone."""

  def __init__(self, num_classes=5):
    super().__init__()
    self.patches = nn.Conv2d(3, 12, 4, 4)
    self.prefix = nn.Parameter(torch.randn(1, 3, 12))
    self.positions = nn.Parameter(torch.randn(1, 7, 12))
    self.layers = nn.ModuleList(
      nn.TransformerEncoderLayer(
        12, 3, 24, batch_first=True, dropout=0.1, norm_first=True
      )
      for _ in range(5)
    )
    self.head = nn.Linear(12, num_classes)

  def forward(self, x):
    size = x.shape[0]
    x = self.patches(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.prefix.expand(size, -1, -1), x], 1) + self.positions
    for layer in self.layers:
      x = layer(x)
    return self.head(x[:, 0])


class Awkward(nn.Module):
  """Works in place, has buffers named as the converter's, ties weights, and has
  two submodules whose names JAX would write alike."""

  def __init__(self, num_classes=5):
    super().__init__()
    self.register_buffer("mean", torch.full((3, 1, 1), 0.7))
    self.register_buffer("std", torch.full((3, 1, 1), 0.3))
    self.stem = nn.Conv2d(3, 6, 3, 1, 1)
    self.a = nn.Sequential(nn.Identity(), nn.Conv2d(6, 6, 3, 2, 1))
    self.a_1 = nn.Conv2d(6, 6, 3, 1, 1)
    self.again = nn.Conv2d(6, 6, 3, 1, 1)
    self.again.weight = self.a_1.weight
    self.flat = nn.Conv1d(6, 9, 1)
    self.attention = nn.Softmax(-1)
    self.head = nn.Linear(9, num_classes)

  def forward(self, x):
    x = self.stem((x - self.mean) / self.std)
    x += 1  # In place.
    x = self.again(self.a_1(self.a(x)))
    x = self.flat(x.flatten(2))  # [B, C, N].
    weights = self.attention(x.transpose(1, 2)[:, None] @ x[:, None])
    return self.head((weights[:, 0] @ x.transpose(1, 2)).mean(1))


class TwoOutputs(nn.Module):
  def forward(self, x):
    return {"logits": x.mean((2, 3)), "map": x}


def make_convolutional(num_classes=5):
  """Make one with weights that depend on the number of classes alone."""
  torch.manual_seed(num_classes)
  network = Convolutional(num_classes)
  network.blocks[0].norm.running_mean.normal_()
  return network


def make_transformer(num_classes=5):
  """See `make_convolutional`."""
  torch.manual_seed(num_classes)
  return Transformer(num_classes)


def make_awkward(num_classes=5):
  """See `make_convolutional`."""
  torch.manual_seed(num_classes)
  return Awkward(num_classes)


class Branching(Convolutional):
  """Its forward pass depends on values."""

  def forward(self, x):
    return super().forward(-x if x.sum() > 0 else x)


def make_branching():
  return Branching()


class Resizing(nn.Module):
  """Its maps have one size, whatever that of the images."""

  def __init__(self):
    super().__init__()
    self.conv = nn.Conv2d(3, 4, 3)

  def forward(self, x):
    x = nn.functional.interpolate(x, (12, 12))
    return self.conv(x).mean((2, 3))


def make_resizing():
  return Resizing()


def make_script():
  return torch.jit.script(Convolutional())


def make_compiled():
  return torch.compile(make_convolutional())


def make_nothing():
  """Return no network."""


class _NormedQueries(nn.Module):
  """Attention over patches, whose queries [B, heads, N, C] are normalised."""

  def __init__(self):
    super().__init__()
    self.patches = nn.Conv2d(3, 8, 4, 4)
    self.q_norm = nn.LayerNorm(4)
    self.project = nn.Linear(8, 8)
    self.head = nn.Linear(8, 5)

  def forward(self, x):
    x = self.patches(x).flatten(2).transpose(1, 2)
    queries = self.q_norm(x.unflatten(2, (2, 4)).transpose(1, 2))
    x = self.project(x + queries.transpose(1, 2).flatten(2))
    return self.head(x.mean(1))


def normed_queries():
  return _NormedQueries()
