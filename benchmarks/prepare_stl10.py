"""Make the files of the paper's STL-10 setting.

    python -m benchmarks.prepare_stl10 stl10_binary L2T-ww local

reads the official archive (https://cs.stanford.edu/~acoates/stl10, unpacked)
and a clone of the authors' repository (https://github.com/alinlab/L2T-ww), and
writes to the third folder

  stl10_32.npz       the labelled images in the official order, 32x32
  author_splits.npz  the authors' training, validation and test images
  tinyimagenet_resnet32.safetensors
                     the authors' source network

which benchmarks/gpu_stl10.sh and benchmarks/few_labels.py read. Needs torch, to
read the authors' files; code in them is not run.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
import PIL.Image

from l2t_jax import imports
from l2t_jax.models import torch_weights

_SIZE, _RESIZED = 96, 32
_SOURCE = "logs/tinyimagenet-200-resnet32/0/model_best.pth.tar"


def read_images(path: pathlib.Path) -> np.ndarray:
  """Read a file like train_X.bin; return uint8 images [N, 32, 32, 3]."""
  # Channels come first, and columns before rows.
  images = np.fromfile(path, np.uint8).reshape(-1, 3, _SIZE, _SIZE)
  shape = (_RESIZED, _RESIZED)
  resize = lambda image: PIL.Image.fromarray(image).resize(
    shape, PIL.Image.Resampling.BILINEAR
  )
  return np.stack([np.asarray(resize(x)) for x in images.transpose(0, 3, 2, 1)])


def read_labels(path: pathlib.Path) -> np.ndarray:
  """Read a file like train_y.bin; return labels [N] from 0."""
  return np.fromfile(path, np.uint8).astype(np.int64) - 1


def read_splits(repository: pathlib.Path) -> dict[str, np.ndarray]:
  """Read the authors' split; return name -> indices of images."""
  torch = imports.require("torch", needed_for="reading the authors' files")
  splits = {}
  for part in ("train", "val", "test"):
    path = repository / "split" / f"stl10-{part}"
    _, indices = torch.load(path, weights_only=True)  # Classes come first.
    splits[f"stl10_{part}"] = np.array(indices)
  return splits


def main() -> None:
  """Write the three files."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("archive", type=pathlib.Path)
  parser.add_argument("repository", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  splits = read_splits(args.repository)
  np.savez(args.folder / "author_splits.npz", **splits)
  np.savez(
    args.folder / "stl10_32.npz",
    x_train=read_images(args.archive / "train_X.bin"),
    y_train=read_labels(args.archive / "train_y.bin"),
    x_test=read_images(args.archive / "test_X.bin"),
    y_test=read_labels(args.archive / "test_y.bin"),
  )
  torch_weights.convert_file(
    args.repository / _SOURCE,
    args.folder / "tinyimagenet_resnet32.safetensors",
    "resnet32",
  )


if __name__ == "__main__":
  main()
