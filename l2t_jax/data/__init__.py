"""Data loading: `load` opens a data set, splits it and makes batches."""

from l2t_jax.data.data_fields import (
  DataFields,
  make_eval_resize,
  resized_for_evaluation,
)
from l2t_jax.data.datasets import Dataset
from l2t_jax.data.from_folders import digest
from l2t_jax.data.loading import load, open_images
from l2t_jax.data.records import ImageSet

__all__ = [
  "DataFields",
  "Dataset",
  "ImageSet",
  "digest",
  "load",
  "make_eval_resize",
  "open_images",
  "resized_for_evaluation",
]
