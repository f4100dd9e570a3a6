"""What the paper reports, and in which settings.

Jang et al., "Learning What and Where to Transfer", ICML 2019, Table 1. As in
the README: recalled, and not measurements of this code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import traverse_util

import l2t_jax.config

METHODS = (
  "scratch",
  "lwf",
  "at",
  "lwf_at",
  "fm_single",
  "fm_one_to_one",
  "l2t_w_single",
  "l2t_w_one_to_one",
  "l2t_ww",
)
# Name of a config -> method -> top-1 accuracy in %.
REPORTED: dict[str, dict[str, float]] = {
  name: dict(zip(METHODS, values, strict=True))
  for name, values in {
    "cifar100": (67.7, 69.2, 67.5, 68.8, 69.4, 70.0, 70.3, 70.0, 71.0),
    "stl10": (65.2, 68.6, 74.2, 75.1, 75.0, 76.4, 74.4, 76.4, 78.3),
    "cub200": (42.2, 45.5, 57.7, 58.9, 47.6, 48.9, 52.0, 56.6, 65.1),
    "mit67": (48.9, 53.7, 59.2, 61.4, 55.2, 54.9, 60.4, 59.8, 64.9),
    "stanford40": (36.9, 39.7, 59.3, 60.2, 42.9, 44.5, 46.3, 48.2, 63.1),
    "dogs": (58.1, 66.3, 69.7, 72.7, 66.1, 67.3, 69.2, 69.8, 78.1),
  }.items()
}


class _Setting(NamedTuple):
  """What an accuracy was measured in; as the config of the same name has it."""

  fields: dict[str, Any]  # That are not at their defaults.
  source: str
  num_images: tuple[int, int]  # To train and validate; to test.


_TINYIMAGENET = "resnet32 of 200 classes"
_IMAGENET = "resnet34 of 1000 classes"
_AT_224 = {
  "batch_size": 64,
  "data.image_size": 224,
  "data.augment": "random_resized_crop_flip",
  "target.model": "resnet18",
}
_SETTINGS = {
  "cifar100": _Setting(
    {"data.name": "cifar100"}, _TINYIMAGENET, (50_000, 10_000)
  ),
  "stl10": _Setting({"data.name": "stl10"}, _TINYIMAGENET, (5_000, 8_000)),
  "cub200": _Setting(
    _AT_224
    | {"data.name": "caltech_birds2011", "data.val_fraction": 1000 / 5994},
    _IMAGENET,
    (5_994, 5_794),
  ),
  "mit67": _Setting(_AT_224, _IMAGENET, (5_360, 1_340)),
  "stanford40": _Setting(
    _AT_224 | {"meta.learning_rate": 1e-3}, _IMAGENET, (4_000, 5_532)
  ),
  "dogs": _Setting(
    _AT_224 | {"data.name": "stanford_dogs"}, _IMAGENET, (12_000, 8_580)
  ),
}
# Fields that say where things are, how fast they are computed, what chance
# draws, or what no method of the paper reads.
_FREE = {
  *l2t_jax.config.FREE_FIELDS,
  "method",
  "seed",
  "precision",
  "data.source",
  "data.path",
  "data.split_file",
  "data.split_prefix",
  "data.split_seed",
  "source.weights",
  "kd.temperature",
  "kd.weight",
  "bilevel.mode",
  "bilevel.loop",
}
_NAMED = ("tfds", "bundled")  # Where data.name says what the images are.


def departures(
  name: str,
  config: Mapping[str, Any],
  *,
  source: str = "",
  num_images: tuple[int, int] | None = None,
) -> tuple[str, ...]:
  """Say in what a run is not in the setting that the paper reports.

  Args:
    name: a key of `REPORTED`.
    config: of the run, as in its config.json. Fields that it lacks are at their
      defaults; of others than today's nothing is known.
    source: "MODEL of N classes"; "" where none is read.
    num_images: to train and validate, and to test; None where that is not known
      yet.

  Returns:
    What differs, such as "epochs is 5, not 200"; nothing where the paper's
    numbers are to be compared with.
  """
  setting = _SETTINGS[name]
  expected = l2t_jax.config.comparable(
    traverse_util.unflatten_dict(setting.fields, sep=".")
  )
  ours = l2t_jax.config.comparable(config)
  free = _FREE if ours["data.source"] in _NAMED else _FREE | {"data.name"}
  found = [
    f"{field} is {ours[field]!r}, not {value!r}"
    for field, value in expected.items()
    if field not in free and ours[field] != value
  ]
  if config.get("sources"):
    found.append(f"there are {len(config['sources'])} sources")
  if source and source != setting.source:
    found.append(f"the source is {source}, not {setting.source}")
  if num_images and num_images != setting.num_images:
    show = lambda pair: f"{pair[0]:,} to learn from and {pair[1]:,} to test on"
    found.append(
      f"the images are {show(num_images)}, not {show(setting.num_images)}"
    )
  return tuple(found)
