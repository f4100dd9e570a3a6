"""The accuracies that the paper reports, and the settings behind them.

Jang et al., "Learning What and Where to Transfer", ICML 2019, Table 1. The
numbers are recalled, not measured with this code.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

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


_SOURCE = "the source network"
_LABELLED, _TEST = "number of labelled images", "number of test images"


def _images(num_labelled: int, num_test: int) -> dict[str, Any]:
  """Count images: for training and validation together, and for testing."""
  return {_LABELLED: num_labelled, _TEST: num_test}


# Settings of the reported accuracies that are not in the default config. The
# configs of these names have the same values, but users may edit them.
_AT_32 = {_SOURCE: "resnet32 of 200 classes"}
_AT_224 = {
  _SOURCE: "resnet34 of 1000 classes",
  "batch_size": 64,
  "data.image_size": 224,
  "data.eval_resize": 256,
  "data.augment": "random_resized_crop_flip",
  "target.model": "resnet18",
}
_BIRDS = {"data.name": "caltech_birds2011", "data.val_fraction": 1000 / 5994}
_DOGS = {"data.name": "stanford_dogs"}
_SETTINGS: dict[str, dict[str, Any]] = {
  "cifar100": _AT_32 | {"data.name": "cifar100"} | _images(50_000, 10_000),
  "stl10": _AT_32 | {"data.name": "stl10"} | _images(5_000, 8_000),
  "cub200": _AT_224 | _BIRDS | _images(5_994, 5_794),
  "mit67": _AT_224 | _images(5_360, 1_340),
  "stanford40": _AT_224 | {"meta.learning_rate": 1e-3} | _images(4_000, 5_532),
  "dogs": _AT_224 | _DOGS | _images(12_000, 8_580),
}
# Fields in which a run may differ: the method, paths, splits and seeds, and how
# something is computed.
_FREE = {
  *("method", "seed", "precision", "bilevel.mode", "bilevel.loop"),
  *("data.source", "data.path", "data.split_file", "data.split_prefix"),
  *("data.split_seed", "source.weights"),
}


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
    free_fields: names of more fields that do not affect results.
    source: "MODEL of N classes"; "" if no source is read.
    num_images: (for training and validation, for testing); None if not known
      yet.

  Returns:
    Phrases such as "epochs is 5, not 200"; empty if the run is comparable with
    the paper's numbers.
  """
  expected = {**defaults, **_SETTINGS[name]}
  actual = dict(fields)
  actual |= {_SOURCE: source} if source else {}
  actual |= _images(*num_images) if num_images else {}
  free = _FREE | set(free_fields) | ({_SOURCE, _LABELLED, _TEST} - set(actual))
  # With other sources, the name of a data set does not identify its images.
  if fields["data.source"] not in ("tfds", "bundled"):
    free |= {"data.name"}
  return tuple(
    f"{field} is {actual.get(field)!r}, not {expected.get(field)!r}"
    for field in {**expected, **actual}
    if field not in free and actual.get(field) != expected.get(field)
  )
