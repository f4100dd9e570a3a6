"""A small experiment of objects, made without any config."""

import jax
import numpy as np

from l2t_jax import data, models
from l2t_jax.data import from_arrays
from l2t_jax.models import resnet, vgg
from l2t_jax.run import experiments

_SHAPE = (8, 8, 1)
_SOURCE = resnet.CifarResNet(blocks_per_stage=1, num_classes=3, widths=(4, 6))


def create(*, image_seed=0, source_seed=0, num_classes=4, beta=0.5):
  """Return an experiment of l2t_ww: two epochs of three iterations."""
  rng = np.random.default_rng(image_seed)
  arrays = {}
  for part, count in (("train", 24), ("val", 8), ("test", 8)):
    arrays[f"x_{part}"] = rng.integers(0, 256, (count, *_SHAPE), np.uint8)
    arrays[f"y_{part}"] = np.arange(count) % 4
  reading = data.DataFields(
    image_size=8, channels=1, mean=(0.5,), std=(0.25,), val_fraction=0.1
  )
  settings = experiments.Settings(
    method="l2t_ww",
    seed=0,
    epochs=2,
    init_from="",
    batch_size=8,
    precision="f32",
    shard_params=False,
    bad_numbers="stop",
    transfer=experiments.Transfer(
      pairs="",
      beta=beta,
      channel_weights="learned",
      pair_weights="learned",
      pair_activation="relu6",
      feature_scale="none",
      map="",
    ),
    losses={
      "lwf": {"temperature": 2.0, "weight": 1.0},
      "at": {"beta": 1000.0},
      "kd": {"temperature": 4.0, "weight": 1.0},
      "aft": {"weight": 10.0},
      "afd": {"weight": 200.0, "dim": 128},
    },
    optimizer=experiments.Optimizer(
      name="sgd",
      learning_rate=0.1,
      schedule="cosine",
      warmup_steps=0,
      warmup_epochs=0.0,
      momentum=0.9,
      b2=0.999,
      weight_decay=1e-4,
      decayed="all",
      clip_norm=0.0,
      ema_decay=0.0,
    ),
    meta=experiments.Meta(
      learning_rate=1e-3, weight_decay=1e-4, clip_norm=0.0, update_every=1
    ),
    bilevel=experiments.Bilevel(
      num_inner_steps=2,
      look_ahead_loss="auxiliary",
      outer_images="batch",
      mode="auto",
      loop="scan",
    ),
    trackers=(),
    log_every=5,
    checkpoint_every=2,
    checkpoint_steps=0,
    evaluate_test=True,
  )
  params, state = models.init(_SOURCE, jax.random.key(source_seed), _SHAPE)
  return experiments.Experiment(
    vgg.VGG(plan=(6, "M", 8, "M"), num_classes=num_classes),
    from_arrays.image_set(arrays, "arrays"),
    reading,
    settings,
    {"": experiments.Source(_SOURCE, params, state)},
  )
