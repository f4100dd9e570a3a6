"""Custom losses: multi-label classification, regression and segmentation.

    python -m examples.tasks

Three tasks on scikit-learn's digits that are not classification. Each consists
of a `types.Task`, a loss and an accuracy, and an npz file with the images
`x_train` and their targets `t_train`. The features of a network that classifies
digits are transferred to all three. `config_of` sets the fields that would be
given to `train.py`; a task is selected as
`--config.target.task=examples.tasks:ANGLE`.
"""

import argparse
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from sklearn import datasets

from configs import digits, digits_source
from l2t_jax import types
from l2t_jax.run import from_config

SIZE = 16
MAX_ANGLE = 60


def _by_image(x):
  """Average over all axes but the first: [B, ...] -> [B]."""
  return jnp.mean(x.reshape(len(x), -1), axis=-1)


# Which of the ten digits are in a picture: outputs and labels [B, 10].
PRESENCE = types.Task(
  loss=lambda outputs, labels: jnp.mean(
    optax.sigmoid_binary_cross_entropy(outputs, labels)
  ),
  accuracy=lambda outputs, labels: _by_image((outputs > 0) == labels),
)
# The rotation of a digit, scaled to [-1, 1]: outputs [B, 1], labels [B].
ANGLE = types.Task(
  loss=lambda outputs, labels: jnp.mean(
    optax.huber_loss(outputs[:, 0], labels, delta=0.2)
  ),
  accuracy=lambda outputs, labels: -jnp.abs(outputs[:, 0] - labels),
)
# A mask of the ink under the noise: outputs and labels [B, 16, 16].
INK = types.Task(
  loss=PRESENCE.loss,
  # Intersection over union.
  accuracy=lambda outputs, labels: (
    jnp.sum((outputs > 0) & (labels > 0), axis=(1, 2))
    / jnp.maximum(jnp.sum((outputs > 0) | (labels > 0), axis=(1, 2)), 1)
  ),
)


class Segmenter(nn.Module):
  """Images [B, H, W, C] -> logits [B, H, W]."""

  @nn.compact
  def __call__(self, x, train):
    layer = lambda x, width, name: nn.relu(
      nn.BatchNorm(use_running_average=not train, name=f"{name}_norm")(
        nn.Conv(width, (3, 3), name=name)(x)
      )
    )
    fine = layer(x, 16, "fine")
    coarse = layer(nn.avg_pool(fine, (2, 2), (2, 2)), 32, "coarse")
    coarse = layer(coarse, 32, "coarse2")
    back = jax.image.resize(coarse, (*fine.shape[:3], 32), "bilinear")
    x = layer(jnp.concatenate([fine, back], axis=-1), 16, "merged")
    return nn.Conv(1, (1, 1), name="logits")(x)[..., 0]


def segmenter(num_classes):
  del num_classes
  return Segmenter()


def _digits(size):
  images, labels = datasets.load_digits(return_X_y=True)
  pictures = [
    Image.fromarray(np.uint8(image.reshape(8, 8) * 15)).resize(
      (size, size), Image.Resampling.BILINEAR
    )
    for image in images
  ]
  return pictures, labels


def presence_data(rng):
  """Draw two digits per image, in opposite corners."""
  pictures, labels = _digits(SIZE // 2)
  x = np.zeros((len(pictures), SIZE, SIZE), np.uint8)
  t = np.zeros((len(pictures), 10), np.int32)
  for i, others in enumerate(
    rng.integers(0, len(pictures), (len(pictures), 2))
  ):
    corners = (slice(None, SIZE // 2), slice(SIZE // 2, None))
    for corner, other in zip(corners, others, strict=True):
      x[i, corner, corner] = pictures[other]
      t[i, labels[other]] = 1
  return x, t


def angle_data(rng):
  """Draw rotated digits, with their angles as targets."""
  pictures, _ = _digits(SIZE)
  turns = rng.uniform(-1, 1, len(pictures)).astype(np.float32)
  x = [
    np.asarray(picture.rotate(MAX_ANGLE * turn))
    for picture, turn in zip(pictures, turns, strict=True)
  ]
  return np.stack(x), turns


def ink_data(rng):
  """Draw digits under noise, with their masks as targets."""
  x = np.stack([np.asarray(picture) for picture in _digits(SIZE)[0]])
  noisy = 0.4 * x + rng.normal(80, 60, x.shape)
  return np.uint8(np.clip(noisy, 0, 255)), np.int32(x > 100)


# Name -> (data, model, outputs).
TASKS = {
  "PRESENCE": (presence_data, "vgg_tiny", 10),
  "ANGLE": (angle_data, "vgg_tiny", 1),
  "INK": (ink_data, "examples.tasks:segmenter", 0),
}


def config_of(task, folder, source, method, epochs):
  """Return the config of a run and write its data."""
  make_data, model, num_outputs = TASKS[task]
  x, t = make_data(np.random.default_rng(0))
  folder.mkdir(parents=True, exist_ok=True)
  np.savez(folder / f"{task}.npz", x_train=x, t_train=t)
  config = digits.get_config()
  config.method = method
  config.epochs = epochs
  config.batch_size = 32
  config.source.weights = str(source)
  config.target.model = model
  config.target.task = f"examples.tasks:{task}"
  config.target.num_outputs = num_outputs
  config.transfer.pairs = "nearest"
  config.data.source = "npz"
  config.data.path = str(folder / f"{task}.npz")
  config.data.per_class = 600
  config.data.augment = "none"
  return config


def main(workdir: pathlib.Path) -> dict[tuple[str, str], float]:
  """Train the source and all targets; return (task, method) -> accuracy."""
  from_config.train_and_evaluate(
    digits_source.get_config(), {0: workdir / "source"}
  )
  source = workdir / "source" / "target.safetensors"
  results = {}
  for task in TASKS:
    for method in ("scratch", "l2t_ww"):
      config = config_of(task, workdir / "data", source, method, epochs=40)
      (summary,) = from_config.train_and_evaluate(
        config, {config.seed: workdir / task / method}
      )
      results[task, method] = summary["test_accuracy"]
  for (task, method), accuracy in results.items():
    print(f"{task:10} {method:10} {accuracy:.3f}")
  return results


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--workdir", type=pathlib.Path, default=pathlib.Path("runs/tasks")
  )
  main(parser.parse_args().workdir)
