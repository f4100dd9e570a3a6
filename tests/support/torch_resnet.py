"""ResNets as functions of a torchvision state dict, for comparison."""

import torch.nn.functional as F


def resnet(tensors, images, stage_sizes, num_convs):
  """Return (logits, [output of each stage]) in eval mode.

  Args:
    tensors: state dict in torchvision's layout.
    images: [B, 3, H, W].
    stage_sizes: blocks in each of the four stages.
    num_convs: convolutions in a block: 2 (basic), 3 (bottleneck).
  """

  def conv(x, name, stride):
    weight = tensors[f"{name}.weight"]
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

  def norm(x, name):
    mean, var, scale, bias = (
      tensors[f"{name}.{leaf}"]
      for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, scale, bias, eps=1e-5)

  x = F.relu(norm(conv(images, "conv1", 2), "bn1"))
  x = F.max_pool2d(x, 3, stride=2, padding=1)
  stages = []
  for stage, size in enumerate(stage_sizes, start=1):
    for block in range(size):
      name = f"layer{stage}.{block}"
      stride = 2 if stage > 1 and block == 0 else 1
      y = x
      for i in range(1, num_convs + 1):
        # The first 3x3 convolution strides.
        here = stride if i == num_convs - 1 else 1
        y = norm(conv(y, f"{name}.conv{i}", here), f"{name}.bn{i}")
        y = F.relu(y) if i < num_convs else y
      if f"{name}.downsample.0.weight" in tensors:
        x = norm(
          conv(x, f"{name}.downsample.0", stride), f"{name}.downsample.1"
        )
      x = F.relu(x + y)
    stages.append(x)
  return F.linear(
    x.mean((2, 3)), tensors["fc.weight"], tensors["fc.bias"]
  ), stages
