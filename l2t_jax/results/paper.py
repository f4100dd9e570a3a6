"""The accuracies that the paper reports, and the settings they stand for.

Jang et al., "Learning What and Where to Transfer", ICML 2019, Table 1. As in
the README: recalled, and not measured with this code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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
  """What the reported accuracies of a config were measured with."""

  fields: dict[str, Any]  # Those that differ from the default config.
  source: str
  num_images: tuple[int, int]  # To train and validate; to test.


# The configs of these names say the same: one that was edited must not pass for
# the paper's.
_AT_224 = {
  "batch_size": 64,
  "data.image_size": 224,
  "data.eval_resize": 256,
  "data.augment": "random_resized_crop_flip",
  "target.model": "resnet18",
}
_BIRDS = {"data.name": "caltech_birds2011", "data.val_fraction": 1000 / 5994}
_TINYIMAGENET, _IMAGENET = "resnet32 of 200 classes", "resnet34 of 1000 classes"
_SETTINGS = {
  "cifar100": _Setting(
    {"data.name": "cifar100"}, _TINYIMAGENET, (50_000, 10_000)
  ),
  "stl10": _Setting({"data.name": "stl10"}, _TINYIMAGENET, (5_000, 8_000)),
  "cub200": _Setting(_AT_224 | _BIRDS, _IMAGENET, (5_994, 5_794)),
  "mit67": _Setting(_AT_224, _IMAGENET, (5_360, 1_340)),
  "stanford40": _Setting(
    _AT_224 | {"meta.learning_rate": 1e-3}, _IMAGENET, (4_000, 5_532)
  ),
  "dogs": _Setting(
    _AT_224 | {"data.name": "stanford_dogs"}, _IMAGENET, (12_000, 8_580)
  ),
}
# Fields that say where things are, how they are computed, what chance draws, or
# what no method of the paper reads.
_FREE = {
  *("method", "seed", "precision", "bilevel.mode", "bilevel.loop"),
  *("data.source", "data.path", "data.split_file", "data.split_prefix"),
  *("data.split_seed", "source.weights", "kd.temperature", "kd.weight"),
}
_NAMED = ("tfds", "bundled")  # Where data.name says what the images are.


def departures(
  name: str,
  fields: Mapping[str, Any],
  defaults: Mapping[str, Any],
  *,
  free_fields: Collection[str] = (),
  source: str = "",
  num_images: tuple[int, int] | None = None,
) -> tuple[str, ...]:
  """List how a run departs from the setting that the paper reports.

  Args:
    name: a key of `REPORTED`.
    fields: of the run's config, by their dotted names.
    defaults: those of the default config.
    free_fields: names of more fields that decide no result.
    source: "MODEL of N classes"; "" if none is read.
    num_images: to train and validate, and to test; None if not known yet.

  Returns:
    Phrases such as "epochs is 5, not 200"; empty if the paper's numbers may
    stand beside the run's.
  """
  setting = _SETTINGS[name]
  free = _FREE | set(free_fields)
  if fields["data.source"] not in _NAMED:
    free |= {"data.name"}
  found = [
    f"{field} is {fields[field]!r}, not {value!r}"
    for field, value in {**defaults, **setting.fields}.items()
    if field not in free and fields[field] != value
  ]
  sources = {f.split(".")[1] for f in fields if f.startswith("sources.")}
  if sources:
    found.append(f"there are {len(sources)} sources")
  if source and source != setting.source:
    found.append(f"the source is {source}, not {setting.source}")
  if num_images and num_images != setting.num_images:
    show = lambda pair: f"{pair[0]:,} to learn from and {pair[1]:,} to test on"
    found.append(
      f"the images are {show(num_images)}, not {show(setting.num_images)}"
    )
  return tuple(found)
