"""Bad inputs and the messages that answer them, as data.

    python -m tests.support.bad_input > docs/guides/bad_input.md

writes the page of them; tests/commands/test_bad_input.py runs every case and
compares what is printed with what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import json
import pathlib
import pickle
import shutil
from typing import Any, NamedTuple

from flax import traverse_util
import jax
import numpy as np
import PIL.Image
import safetensors.numpy

from configs import default
from l2t_jax import errors, models
from l2t_jax.models import programs, torch_weights, weight_files

CANNOT = errors.StorageError.exit_code
SIZE = 8  # Of all images, in pixels.
EVIDENCE = "it_ran"  # A file that only a pickle's code would make.
TRAIN, TABLE = "train.py", "l2t_jax.table"
CONVERT, PREDICT = "l2t_jax.pretrained", "l2t_jax.predict"
REPORT = "l2t_jax.report"
_CONVERTED = "in.safetensors out.safetensors --model=resnet_tiny"
_FOLDER = "--config.data.source=folder --config.data.path=images"
_SPLIT = "--config.data.split_file=split.npz --config.data.split_prefix=a"
_SCRATCH = "--config.method=scratch"
_RGB = f"{_FOLDER} {_SCRATCH} --config.data.channels=3"
_MINE = "--config.target.model=mine:Net"

Prepare = Callable[[pathlib.Path], object]


class Case(NamedTuple):
  """A command in the folder that `set_up` makes and `prepare` changes."""

  wrong: str  # For readers.
  arguments: str  # Of the command, between blanks, beside --config, --workdir.
  said: str  # On stderr, after "error: "; for readers where nothing is wrong.
  prepare: Prepare = lambda folder: None
  command: str = TRAIN
  code: int = errors.InputError.exit_code
  needs: str = ""  # A package that may be absent.


def get_config():
  """A small run on the files of `set_up`."""
  config = default.get_config()
  config.epochs = 1
  config.batch_size = 8
  config.data.source = "npz"
  config.data.path = "data.npz"
  config.data.image_size = SIZE
  config.data.channels = 1
  config.data.mean = config.data.std = (0.5,)
  config.data.augment = "none"
  config.data.val_fraction = config.data.test_fraction = 0.25
  config.source.weights = "source.safetensors"
  config.target.model = "vgg_tiny"
  config.trackers = ()
  return config


def set_up(folder: pathlib.Path) -> None:
  """Write what a run needs: small.py, data.npz and source.safetensors."""
  _write(
    "small.py", "from tests.support.bad_input import get_config as get_config"
  )(folder)
  _data()(folder)
  _source()(folder)


def page() -> str:
  """Return the page of all cases."""
  lines = [_INTRODUCTION]
  for group, cases in CASES.items():
    accepted = not any(case.code for case in cases)
    lines += [
      f"\n## {group}\n",
      f"| {'Input' if accepted else 'Cause'} |"
      f" {'What happens' if accepted else 'Message'} | Exit code |",
      "|---|---|---|",
    ]
    for case in cases:
      said = case.said if accepted else f"`{case.said}`"
      assert "|" not in said and "`" not in case.said
      lines.append(f"| {case.wrong} | {said} | {case.code} |")
  return "\n".join(lines) + "\n"


def _write(name: str, *lines: str) -> Prepare:
  def write(folder):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))

  return write


def _images(num_images: int = 64, seed: int = 0):
  """Draw images of two classes, with their labels."""
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (num_images, SIZE, SIZE), np.uint8)
  return images, np.arange(num_images) % 2


_X, _Y = _images()


def _data(**changes: Any) -> Prepare:
  """Write data.npz with other arrays; None leaves one out."""
  arrays = {"x_train": _X, "y_train": _Y} | changes
  arrays = {name: array for name, array in arrays.items() if array is not None}
  return lambda folder: np.savez(folder / "data.npz", **arrays)


def _split(**changes: Any) -> Prepare:
  """Write split.npz with other indices; None leaves one out."""
  indices = {
    "a_train": np.arange(40),
    "a_val": np.arange(40, 52),
    "a_test": np.arange(52, 64),
  } | changes
  indices = {name: part for name, part in indices.items() if part is not None}
  return lambda folder: np.savez(folder / "split.npz", **indices)


def _pictures(
  spoil: Prepare = lambda images: None,
  parts: tuple[str, ...] = ("",),
  names: tuple[str, ...] = ("cat", "dog"),
  mode: str = "RGB",
) -> Prepare:
  """Write images/PART/CLASS/*.png, and spoil the folder."""

  def prepare(folder):
    rng = np.random.default_rng(0)
    for part in parts:
      for name in names:
        place = folder / "images" / part / name
        place.mkdir(parents=True)
        for number in range(16):
          pixels = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
          image = PIL.Image.fromarray(pixels).convert(mode)
          image.save(place / f"{number}.png")
    spoil(folder / "images")

  return prepare


def _cut(path: pathlib.Path, size: int = 60) -> None:
  path.write_bytes(path.read_bytes()[:size])


@functools.cache
def _variables() -> dict[str, np.ndarray]:
  """Draw weights of a ResNet for 5 classes of grey images."""
  network = models.create("resnet_tiny", 5)
  layout = models.trace(network, (SIZE, SIZE, 1))
  rng = np.random.default_rng(0)
  draw = lambda x: 0.01 + 0.1 * rng.random(x.shape, np.float32)
  drawn = jax.tree.map(draw, layout.variables)
  return traverse_util.flatten_dict(drawn, sep="/")


def _replace(changes: Mapping[str, Any], tensors):
  """Change some tensors; None leaves one out."""
  tensors = {**tensors, **changes}
  return {name: x for name, x in tensors.items() if x is not None}


def _source(changes: Mapping[str, Any] = {}, **metadata: str) -> Prepare:
  """Write source.safetensors with other tensors, or told otherwise."""
  usual = {"model": "resnet_tiny", "num_classes": "5", "channels": "1"}

  def prepare(folder):
    tensors = traverse_util.unflatten_dict(
      _replace(changes, _variables()), sep="/"
    )
    path = folder / "source.safetensors"
    weight_files.save(path, tensors, usual | metadata)

  return prepare


def _checkpoint(
  changes: Mapping[str, Any] = {}, prefixes: tuple[str, ...] = ("",)
) -> Prepare:
  """Write in.safetensors, the source in PyTorch's layout, changed."""

  def prepare(folder):
    tensors = {
      torch_weights.torch_name(tuple(name.split("/"))): np.ascontiguousarray(
        torch_weights.to_torch_layout(x)
      )
      for name, x in _variables().items()
    }
    path = folder / "in.safetensors"
    changed = _replace(changes, tensors)
    named = {f"{p}{name}": x for p in prefixes for name, x in changed.items()}
    safetensors.numpy.save_file(named, path)

  return prepare


def write_program(
  gain: float = 1.0, offset: float = 0.0, **metadata: str
) -> Prepare:
  """Write source.safetensors, a network that was converted to a program.

  Args:
    gain: by which the program multiplies the images, to get its features.
    offset: which it adds to them.
    **metadata: of the file.
  """
  usual = {"model": "timm:x", "num_classes": "2", "precision": "f32"}
  usual["command"] = "python -m l2t_jax.pretrained timm:x source.safetensors"

  def apply(params, images):
    return (images.mean((1, 2)) @ params["kernel"], gain * images + offset)

  def prepare(folder):
    network = programs.Exportable(
      apply, {"kernel": np.ones((3, 2), np.float32)}, apply, SIZE, ("stem",)
    )
    path = folder / "source.safetensors"
    program = programs.export(network)
    weight_files.save_program(path, network, program, usual | metadata)

  return prepare


def _both(*steps: Prepare) -> Prepare:
  return lambda folder: [step(folder) for step in steps]


class RunsCode:
  """What would run code where its pickle is loaded."""

  def __reduce__(self):
    return exec, (f"open({EVIDENCE!r}, 'w').close()",)


def _pickle(folder):
  content = {"state_dict": RunsCode()}
  data = pickle.dumps(content, protocol=2, fix_imports=False)
  (folder / "in.pth").write_bytes(data)


def _run_of(**fields: Any) -> Prepare:
  """Write run/config.json of a run with other fields."""

  def prepare(folder):
    config = get_config()
    config.update(fields)
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(config.to_json())

  return prepare


def _map(**fields: Any) -> Prepare:
  """Write map.json, of one pair."""
  pair = {
    "source": "stage1_block1",
    "target": "conv1",
    "pair_weight": 1.0,
    "num_channels": 1,
    "channel_weights": [1.0],
  } | fields
  return _write("map.json", json.dumps({"pairs": [pair]}))


def _with_nan(array: np.ndarray) -> np.ndarray:
  array = array.astype(np.float32)
  array.flat[0] = np.nan
  return array


# A network with a layer [B, H, W, 0] and one [B, C].
_NETWORK = _write(
  "mine.py",
  "from flax import linen as nn",
  "class Empty(nn.Module):",
  "  def __call__(self, x):",
  "    return x[..., :0]",
  "class Net(nn.Module):",
  "  num_classes: int",
  "  @nn.compact",
  "  def __call__(self, x):",
  "    x = nn.Conv(8, (3, 3), name='conv')(x)",
  "    Empty(name='empty')(x)",
  "    x = nn.Dense(16, name='hidden')(x.mean((1, 2)))",
  "    return nn.Dense(self.num_classes, name='head')(x)",
)

_INTRODUCTION = """\
# Error messages

Commands answer bad input with one line on stderr, `error: ` and one of the
messages below, usually before anything is compiled. This page is
generated from the cases that the tests run; folders called `run`, `images` and
the like stand for your own.

| Exit code | Meaning | The same command again |
|---|---|---|
| 0 | done | says that there is nothing to do |
| 1 | a run of a table has failed | repeats this run |
| 2 | wrong input: a value, a file, a folder | fails until that is corrected |
| 3 | a loss, gradient or weight is NaN or infinite | fails again |
| 4 | a file could not be read or written | resumes, once it can |
| 5 | another process of the run, or one that reads images, was lost | resumes |
| 75 | interrupted by a signal | resumes |
| 137, 143 | killed; 143: by a SIGTERM while packages are imported | resumes |

The table of several runs (`python -m l2t_jax.table`) checks fields and files of
all its cells before it trains the first. What is found later, such as a network
that does not fit the data, fails in its own run."""

# Heading -> what is wrong there.
CASES: Mapping[str, tuple[Case, ...]] = {
  "Config": (
    Case(
      "A field is misspelt",
      "--config.source.wieghts=x",
      "unknown field config.source.wieghts; did you mean "
      "config.source.weights? l2t_jax/config.py lists all fields",
    ),
    Case(
      "Text where a whole number belongs",
      "--config.epochs=ten",
      "flag --config.epochs=ten: invalid literal for int() with base 10: 'ten'",
    ),
    Case(
      "A number out of range",
      "--config.epochs=0",
      "config.epochs is 0; it must be at least 1",
    ),
    Case(
      "An unknown method",
      "--config.method=l2t",
      "unknown method 'l2t'; the methods are scratch, finetune, linear_probe, "
      "finetune_source, lwf, at, lwf_at, kd, afd, aft, fm_single, "
      "fm_one_to_one, fm_all_to_all, fm_search, l2t_w_single, "
      "l2t_w_one_to_one, l2t_ww, l2t_ww_joint, or a combination such as "
      "kd+l2t_ww",
    ),
    Case(
      "An unknown tracker",
      "--config.trackers=('tensorbord',)",
      "config.trackers has 'tensorbord'; there are tensorboard, wandb, mlflow",
    ),
    Case(
      "Label smoothing for a task other than classification",
      f"{_SCRATCH} --config.target.task=examples.tasks:ANGLE "
      "--config.target.label_smoothing=0.1",
      "config.target.label_smoothing is 0.1, but the task is not "
      "classification; set it to 0",
    ),
    Case(
      "Mixup for a task other than classification",
      f"{_SCRATCH} --config.target.task=examples.tasks:ANGLE "
      "--config.data.mixup=0.8",
      "config.data.mixup is 0.8, but the task is not classification; set it to "
      "0",
    ),
    Case(
      "A magnitude of RandAugment out of range",
      "--config.data.rand_augment_magnitude=31",
      "config.data.rand_augment_magnitude is 31; it must be from 0 to 30",
    ),
    Case(
      "An unknown optimizer",
      "--config.optimizer.name=adam",
      "unknown optimizer 'adam'; it must be one of sgd, adamw, or "
      "'package.module:function', which takes a learning rate and returns an "
      "optax transformation",
    ),
    Case(
      "An optimizer that cannot be differentiated",
      "--config.optimizer.name=optax:adam",
      "the inner optimizer's updates have no finite derivative at a zero "
      "gradient; choose a differentiable one (for optax.adam: eps_root=1e-24)",
    ),
    Case(
      "An optimizer that keeps its learning rate in its state",
      "--config.optimizer.name=mine:kept",
      "the optimizer's updates do not change with the learning rate, which it "
      "ignores or keeps in its state, as optax.inject_hyperparams does; return "
      "a transformation that uses the rate it is given",
      _write(
        "mine.py",
        "import optax\n"
        "kept = lambda rate: optax.inject_hyperparams(optax.sgd)(rate)",
      ),
    ),
    Case(
      "An optimizer that needs more than a gradient",
      "--config.optimizer.name=optax:lbfgs",
      "the optimizer cannot update this network at a traced learning rate: "
      "TypeError: scale_by_zoom_linesearch.<locals>.update_fn() missing 3 "
      "required keyword-only arguments: 'value', 'grad', and 'value_fn'",
    ),
    Case(
      "An image size that is no multiple of the patch size",
      "--config.target.model=vit_tiny --config.data.image_size=18",
      "images are 18x18; for this network their sides must be multiples of 4",
    ),
    Case(
      "A warm-up longer than the run",
      "--config.optimizer.warmup_epochs=2",
      "the warm-up of the learning rate has 8 iterations, but the run has only "
      "4; lower config.optimizer.warmup_steps or warmup_epochs",
    ),
    Case(
      "An unknown target network",
      "--config.target.model=vgg",
      "unknown model 'vgg'; it must be one of resnet_tiny, resnet20, "
      "resnet32, resnet18, resnet34, resnet50, vgg9, vgg_tiny, vit_tiny, "
      "convnext_atto, or a function of your own as "
      "'package.module:function'",
    ),
    Case(
      "A target that cannot be imported",
      "--config.target.model=no_such.module:make",
      "cannot import the model 'no_such.module:make': ModuleNotFoundError: "
      "No module named 'no_such'",
    ),
    Case(
      "A function that does not take num_classes",
      "--config.target.model=mine:Net",
      "the model 'mine:Net' cannot be called with num_classes: got an "
      "unexpected keyword argument 'num_classes'",
      _write("mine.py", "def Net(): pass"),
    ),
    Case(
      "A custom task of the wrong type",
      "--config.target.task=mine:TASK",
      "the task 'mine:TASK' is of type int; it must be a l2t_jax.types.Task",
      _write("mine.py", "TASK = 3"),
    ),
    Case(
      "Fewer outputs than classes",
      "--config.target.num_outputs=1",
      "the target's outputs are ['B', 1], but the data have 2 classes; it "
      "needs a logit for each",
    ),
    Case(
      "Several targets per image, but no number of outputs",
      f"{_SCRATCH} --config.target.task=examples.tasks:PRESENCE",
      "the data have 10 targets for each image, but the target's outputs are "
      "['B', 1]; set config.target.num_outputs: 10 is one for each target, 1 "
      "leaves it as it is",
      _data(y_train=None, t_train=np.zeros((64, 10), np.int32)),
    ),
    Case(
      "No source weights for a method that needs them",
      "--config.source.weights=",
      "method 'l2t_ww' needs config.source.weights: a file made by python "
      "-m l2t_jax.pretrained, or target.safetensors of another run",
    ),
    Case(
      "A checkpoint of PyTorch as the source",
      "--config.source.weights=mine.pth",
      "mine.pth is not a whole safetensors file; convert it with python -m "
      "l2t_jax.pretrained",
      _write("mine.pth", "PK"),
    ),
    Case(
      "A search for pairs outside a table",
      "--config.method=fm_search",
      "method 'fm_search' needs config.transfer.pairs; python -m "
      "l2t_jax.table searches for them",
    ),
    Case(
      "A source that is not in the config file",
      "--config.sources.big.weights=x",
      "--config.sources.big.weights=x: small.py has no such source; sources"
      " are added in a config file, config.sources.NAME = default.source()",
    ),
    Case(
      "A config file that does not exist",
      "--config=nope.py",
      "--config=nope.py: there is no file 'nope.py'; name a config file, "
      "such as configs/stl10.py, or config.json of a run",
    ),
    Case(
      "A config file that sets a wrong type",
      "--config=mine.py",
      "--config=mine.py: TypeError: Could not override field 'epochs' "
      "(reference). ten is of original type <class 'str'> and cannot be "
      "casted to type <class 'int'>",
      _write(
        "mine.py",
        "from tests.support import bad_input",
        "def get_config():",
        "  config = bad_input.get_config()",
        "  config.epochs = 'ten'",
        "  return config",
      ),
    ),
    Case(
      "A config.json that was cut off",
      "--config=config.json",
      "--config=config.json is not JSON: Expecting value: line 1 column 12 "
      "(char 11)",
      _write("config.json", '{"epochs": '),
    ),
    Case(
      "An argument without dashes",
      "epochs=3",
      "unexpected argument 'epochs=3'; a field is set as "
      "--config.field=value, and --help lists the other arguments",
    ),
    Case(
      "A table with two columns in one folder",
      "--methods=scratch --sweep=transfer.map=a/map.npz,a_map.npz",
      "the columns 'map=a/map.npz' and 'map=a_map.npz' would share the folder "
      "map=a_map.npz; name each once, or give each a --workdir of its own",
      command=TABLE,
    ),
  ),
  "Pairs, taps and maps": (
    Case(
      "An unknown tap",
      "--config.source.taps=('stage9',)",
      "unknown tap 'stage9'; the network's taps are stage1_block1, "
      "stage2_block1, stage3_block1, penultimate",
    ),
    Case(
      "A tap [B, C] instead of [B, H, W, C]",
      f"{_MINE} --config.target.taps=('hidden',)",
      "'hidden' cannot be tapped: its shape is ['B', 16], neither that of a map"
      " [B, H, W, C] nor of tokens [B, N, C] on the grid of a map or a square",
      _NETWORK,
    ),
    Case(
      "A pair of an unknown source tap",
      "--config.transfer.pairs=stage9->conv1",
      "pair 'stage9->conv1': unknown source tap 'stage9'; the source's taps"
      " are stage1_block1, stage2_block1, stage3_block1, penultimate",
    ),
    Case(
      "No pairs of equal resolution",
      "--config.transfer.pairs=one_to_one --config.source.image_size=24",
      "pairs 'one_to_one': no source tap has the resolution of a target tap"
      " (stage1_block1 24x24, stage2_block1 12x12, stage3_block1 6x6; conv1"
      " 8x8, conv2 4x4, conv3 2x2); use 'nearest', 'all_to_all' or list the"
      " pairs",
    ),
    Case(
      "A pair twice",
      "--config.transfer.pairs=stage1_block1->conv1,stage1_block1->conv1",
      "pair 'stage1_block1->conv1' is listed twice",
    ),
    Case(
      "A map that does not exist",
      "--config.transfer.map=map.json",
      "map.json cannot be read (No such file or directory); name the "
      "transfer_map.json of a finished run.",
    ),
    Case(
      "A map that is not JSON",
      "--config.transfer.map=map.json",
      "map.json is not JSON (Expecting property name enclosed in double "
      "quotes: line 1 column 2 (char 1)).",
      _write("map.json", "{"),
    ),
    Case(
      "A map for other numbers of channels",
      "--config.transfer.map=map.json",
      "map.json: pair stage1_block1->conv1 has 1 channel weights, but the "
      "source tap has 16 channels",
      _map(),
    ),
    Case(
      "A map and a list of pairs",
      "--config.transfer.map=map.json --config.transfer.pairs=nearest",
      "config.transfer.map is 'map.json' and decides what "
      "config.transfer.pairs would; leave that at ''",
    ),
  ),
  "Data": (
    Case(
      "An npz file that does not exist",
      "--config.data.path=nope.npz",
      "there is no file 'nope.npz'; an .npz file is needed",
    ),
    Case(
      "A file that is not an npz file",
      "",
      "'data.npz' is not an npz file of plain arrays, or is cut off",
      _write("data.npz", "no arrays"),
    ),
    Case(
      "An npz without labels",
      "",
      "'data.npz' lacks 'y_train'; its keys are x_train",
      _data(y_train=None),
    ),
    Case(
      "NaN among the pixels",
      "",
      "'data.npz': 1 images of x_train have values that are NaN or infinite, "
      "the first is 0; leave these images out, or replace the values",
      _data(x_train=_with_nan(_X)),
    ),
    Case(
      "A wrong number of channels",
      "",
      "channels is 1, but the images are uint8 with 5 channels, which are not "
      "converted; set it to that, or choose channels of the arrays",
      _data(x_train=np.stack([_X] * 5, axis=-1)),
    ),
    Case(
      "More channels than the source takes",
      "--config.data.channels=5",
      "the source source.safetensors sees 1-channel images, but the "
      "target's have 5 channels; set its field bands to the 1 that it shall "
      "see, in its order and counted from 0",
      _data(x_train=np.stack([_X] * 5, axis=-1)),
    ),
    Case(
      "Float images on another scale than mean and std",
      "",
      "mean (0.5,) and std (0.5,) are not for images whose values go from 0 to "
      "255; set both to those of the images, or to () to compute them, or "
      "scale the images",
      _data(x_train=_X.astype(np.float32)),
    ),
    Case(
      "One label too few",
      "",
      "'data.npz': y_train is int64 [63], but must be integer or names [64], "
      "or one-hot [64, K]: one label per image of x_train",
      _data(y_train=_Y[:-1]),
    ),
    Case(
      "A label below 0",
      "",
      "'data.npz': y_train has label -1, but labels start at 0",
      _data(y_train=_Y - 1),
    ),
    Case(
      "A label beyond the class names",
      "",
      "'data.npz': y_train has label 1, but class_names has only 1 entries",
      _data(class_names=["cat"]),
    ),
    Case(
      "A label that leaves classes without images",
      "",
      "38 of 41 classes have no training images: 2, 3, 4, 5, 6 and 33 more; "
      "number the labels from 0 without gaps, or list the classes to keep in "
      "data.classes",
      _data(y_train=np.where(np.arange(64) == 5, 40, _Y)),
    ),
    Case(
      "Identifiers instead of labels",
      "",
      "'data.npz': y_train has label 1000000007, but there are only 64 training"
      " images; labels are numbers from 0 without gaps: class_names ="
      " np.unique(y_train); y_train = np.searchsorted(class_names, y_train)"
      " makes them from identifiers",
      _data(y_train=_Y.astype(np.int64) + 1_000_000_006),
    ),
    Case(
      "Test images that are training images",
      "",
      "'data.npz': 20 of 20 images of test are in train, too; each image "
      "belongs in only one of them",
      _data(x_test=_X[:20], y_test=_Y[:20]),
    ),
    Case(
      "A split whose parts overlap",
      _SPLIT,
      "'split.npz' lists index 50 more than once; each image belongs in only "
      "one of a_train, a_val, a_test",
      _split(a_test=np.arange(50, 64)),
    ),
    Case(
      "A split with an index twice",
      _SPLIT,
      "'split.npz' lists index 40 more than once; each image belongs in only "
      "one of a_train, a_val, a_test",
      _split(a_val=np.array([40, 41, 40])),
    ),
    Case(
      "A split with an index out of range",
      _SPLIT,
      "'split.npz': a_test goes from 63 to 64, but the data set has the "
      "indices 0 to 63",
      _split(a_test=np.array([63, 64])),
    ),
    Case(
      "A split with an empty part",
      _SPLIT,
      "'split.npz': a_val has no images of the classes that are kept; give "
      "it some",
      _split(a_val=np.arange(0)),
    ),
    Case(
      "No validation images",
      "--config.data.val_fraction=0",
      "there are no validation images to choose the best epoch by; set "
      "config.data.val_fraction above 0",
    ),
    Case(
      "Shares that leave no training images",
      "--config.data.val_fraction=0.5 --config.data.test_fraction=0.5",
      "val_fraction 0.5 and test_fraction 0.5 must not be negative, and "
      "their sum must be below 1",
    ),
    Case(
      "A batch larger than the data",
      "--config.batch_size=64",
      "batch_size is 64, but there are only 32 training images",
    ),
    Case(
      "A batch that groups of batch norm do not divide",
      "--config.target.batch_norm_groups=3",
      "config.batch_size is 8; it must be a multiple of "
      "config.target.batch_norm_groups, 3",
    ),
    Case(
      "More images per class than there are",
      "--config.data.per_class=40",
      "per_class is 40, but class '0' has only 16 training images",
    ),
    Case(
      "Unlabelled images, but none are left over",
      "--config.data.unlabeled=True",
      "unlabeled is True, but per_class=0 keeps all images; let per_class "
      "leave some over, or give an unlabeled_path",
    ),
    Case(
      "A class that is not in the data",
      "--config.data.classes=(0,7)",
      "classes takes indices, and has 7; the classes are 0: 0, 1: 1",
    ),
    Case(
      "Images too small for the network",
      "--config.data.image_size=2",
      "maps of 1x1 are too small for a max-pool of 2x2; use larger images "
      "or a network with fewer pools",
    ),
    Case(
      "An unknown augmentation",
      "--config.data.augment=flip",
      "augment 'flip' is not possible when images are in memory; possible: "
      "none, crop, crop_flip",
    ),
    Case(
      "A standard deviation of 0",
      "--config.data.std=(0.0,)",
      "config.data.std is (0.0,); it must hold finite numbers above 0 only",
    ),
    Case(
      "An unknown source of data",
      "--config.data.source=zip",
      "source 'zip' is unknown; possible: bundled, npz, folder, tfds, "
      "huggingface",
    ),
    Case(
      "A folder that does not exist",
      _FOLDER,
      "there is no folder 'images'",
    ),
    Case(
      "A class without images",
      _FOLDER,
      "folder 'images/cow' has no images; their names end in .jpg, .png, .tif "
      "or another suffix of an image format that Pillow reads",
      _pictures(lambda images: (images / "cow").mkdir()),
    ),
    Case(
      "A class that only the validation images have",
      _FOLDER,
      "folder 'images/val' must have the same classes as train; only one of"
      " the two has cow, dog",
      _pictures(
        lambda images: (images / "val" / "dog").rename(images / "val" / "cow"),
        parts=("train", "val"),
      ),
    ),
    Case(
      "Two folders of validation images",
      _FOLDER,
      "folder 'images' has 2 folders for val: Valid, val; move all but one "
      "elsewhere",
      _pictures(parts=("train", "Valid", "val")),
    ),
    Case(
      "Test images without training images",
      _FOLDER,
      "folder 'images' has test, val, but no folder train",
      _pictures(parts=("test", "val")),
    ),
    Case(
      "An image that was cut off",
      _FOLDER,
      "1 of 32 images cannot be used: image images/dog/3.png cannot be read "
      "(OSError); replace or remove them, or set config.data.bad_images to "
      "'skip' and config.data.max_bad_fraction to 0.032",
      _pictures(lambda images: _cut(images / "dog" / "3.png")),
    ),
    Case(
      "A copy of the training images as test images",
      _FOLDER,
      "the images: 24 of 32 images of test are in train, too; each image "
      "belongs in only one of them",
      _pictures(
        lambda images: shutil.copytree(images / "train", images / "test"),
        parts=("train",),
      ),
    ),
    Case(
      "An image file with float pixels",
      _FOLDER,
      "1 of 33 images cannot be used: image images/dog/3.tif has pixels that "
      "are floats, whose values for black and white are unknown; replace or "
      "remove them, or set config.data.bad_images to 'skip' and "
      "config.data.max_bad_fraction to 0.031",
      _pictures(
        lambda images: PIL.Image.new("F", (SIZE, SIZE)).save(
          images / "dog" / "3.tif"
        )
      ),
    ),
    Case(
      "An image to classify that does not exist",
      "run nope.png",
      "there is no image or folder nope.png",
      _run_of(),
      command=PREDICT,
    ),
  ),
  "Weights": (
    Case(
      "Weights that do not exist",
      "--config.source.weights=nope.safetensors",
      "no source weights at nope.safetensors; convert a checkpoint (python "
      "-m l2t_jax.pretrained) or take target.safetensors of another run",
    ),
    Case(
      "A file that was not converted",
      "",
      "source.safetensors was not written by l2t_jax; convert it first: "
      "python -m l2t_jax.pretrained source.safetensors OUT.safetensors "
      "--model=...",
      _both(
        _checkpoint(),
        lambda folder: (folder / "in.safetensors").rename(
          folder / "source.safetensors"
        ),
      ),
    ),
    Case(
      "The name of a network instead of its weight file",
      "--config.source.weights=timm:resnet50",
      "'timm:resnet50' is a network of a library, not a weight file; convert "
      "it once: python -m l2t_jax.pretrained timm:resnet50 OUT.safetensors",
    ),
    Case(
      "A converted network of another size",
      "--config.source.image_size=16",
      "the image_size of the source source.safetensors is 16, but it was "
      "converted for 8; leave it out, or convert it again, with "
      "--image_size=16: python -m l2t_jax.pretrained timm:x "
      "source.safetensors",
      write_program(),
    ),
    Case(
      "A normalisation for a converted network, which has its own",
      "--config.source.mean=(0.5,)",
      "the source source.safetensors normalises its images itself; leave out "
      "its fields mean and std",
      write_program(),
    ),
    Case(
      "A converted network of another precision",
      "--config.precision=bf16",
      "config.precision is 'bf16', but the source source.safetensors was "
      "converted for 'f32'; convert it again, with --precision=bf16: python -m "
      "l2t_jax.pretrained timm:x source.safetensors",
      write_program(),
    ),
    Case(
      "Learning without forgetting from a network without classifier",
      "--config.method=lwf",
      "method 'lwf' needs the source's logits, but the source has no "
      "classifier; use a method that matches features",
      write_program(num_classes="0"),
    ),
    Case(
      "A file that was cut off",
      "",
      "source.safetensors is not a whole safetensors file: Error while "
      "deserializing header: incomplete metadata, file not fully covered",
      _both(
        _source(), lambda folder: _cut(folder / "source.safetensors", 9000)
      ),
    ),
    Case(
      "A tensor of the wrong shape",
      "",
      "source.safetensors on images of 8x8x1 does not fit its weights: "
      "params/fc/bias is [7], expected [5]",
      _source({"params/fc/bias": np.zeros(7, np.float32)}),
    ),
    Case(
      "A tensor with NaN",
      "",
      "source.safetensors: 1 of 5 values of params/fc/bias are NaN or "
      "infinite; take weights of a run that did not diverge",
      _source({"params/fc/bias": _with_nan(np.zeros(5))}),
    ),
    Case(
      "An infinite standard deviation of a source",
      "--config.source.std=(1e999,)",
      "config.source.std is (inf,); it must hold finite numbers above 0 only",
    ),
    Case(
      "A mean of a source without a standard deviation",
      "--config.source.mean=0.1",
      "the source source.safetensors has a mean, 0.1, but no std; set both, or "
      "none to normalise its images as the data's",
    ),
    Case(
      "An array whose name is almost right",
      "",
      "'data.npz' has x_valid; the names of images, classes and targets are "
      "x_, y_ and t_, followed by train, val or test",
      _data(x_valid=np.zeros((4, SIZE, SIZE), np.uint8)),
    ),
    Case(
      "Two means for a source of one channel",
      "--config.source.mean=0.1,0.2 --config.source.std=0.3",
      "mean of the source source.safetensors is (0.1, 0.2), but it sees "
      "images of 1 channels; set its field mean to 1 values",
    ),
    Case(
      "Fine-tuning from another architecture",
      "--config.method=finetune",
      "fine-tuning needs a source of the target's architecture, but only 0 "
      "of 20 arrays of the target have a namesake of their shape in the "
      "source; use a transfer method",
    ),
    Case(
      "Distillation from a source with other classes",
      f"--config.method=kd {_FOLDER}",
      "method 'kd' needs the source's classes to be the target's: the source"
      " and the data do not both have bird, gnu; use 'lwf', or name the"
      " source's classes in its field class_names, or those of the data as"
      " class_names of the npz file",
      _both(
        _pictures(names=("cat", "dog", "eel", "fox", "gnu")),
        _source(class_names='["bird", "cat", "dog", "eel", "fox"]'),
      ),
    ),
    Case(
      "Distillation from a source without class names",
      f"--config.method=kd {_FOLDER}",
      "method 'kd' needs the source's classes to be the target's: the source"
      " does not name its 5 classes; list them in the order of its logits in"
      " its field class_names",
      _pictures(names=("cat", "dog", "eel", "fox", "gnu")),
    ),
    Case(
      "A converted file instead of a run",
      "source.safetensors data.npz",
      "source.safetensors holds converted weights, not a run of l2t_jax: it"
      " does not say which images and classes it is for",
      command=PREDICT,
    ),
    Case(
      "A checkpoint that does not exist",
      _CONVERTED,
      "no checkpoint at in.safetensors",
      command=CONVERT,
    ),
    Case(
      "No network named for a checkpoint",
      "in.pth out.safetensors",
      "in.pth is not timm:NAME, keras:NAME or torch:package.module:function; "
      "for the checkpoint of a bundled network give --model",
      command=CONVERT,
    ),
    Case(
      "A checkpoint without a tensor",
      _CONVERTED,
      "the checkpoint does not fit the network: fc.bias is missing, expected "
      "[5]; choose the network that it was trained with",
      _checkpoint({"fc.bias": None}),
      command=CONVERT,
    ),
    Case(
      "A checkpoint of two networks",
      _CONVERTED,
      "the checkpoint holds several networks of that kind, under a. and b.; "
      "choose one, as by --key=a.",
      _checkpoint(prefixes=("a.", "b.")),
      command=CONVERT,
    ),
    Case(
      "The checkpoint itself as the output",
      "in.safetensors in.safetensors --model=resnet_tiny",
      "in.safetensors is the checkpoint; give another name for the output",
      _checkpoint(),
      command=CONVERT,
    ),
    Case(
      "A standard deviation of 0",
      f"{_CONVERTED} --std=0",
      "argument --std: '0' must be above 0; see --help",
      command=CONVERT,
    ),
    Case(
      "A prefix that no tensor has",
      f"{_CONVERTED} --key=student",
      "in.safetensors has neither a state dict 'student' nor tensors named "
      "student.*; it has one state dict alone",
      _checkpoint(),
      command=CONVERT,
    ),
    Case(
      "A network of torch without its image size",
      "torch:mine:make out.safetensors --image_size=64",
      "torch:mine:make: give --mean and --std of the images that it was trained"
      " on (--mean=0 --std=1 if it normalises them itself)",
      command=CONVERT,
      needs="torchax",
    ),
    Case(
      "A mean for pixels from 0 to 255",
      "torch:mine:make out.safetensors --image_size=64 --mean=124,116,104",
      "argument --mean: '124,116,104' must be on a scale from 0 to 1: divide "
      "values for pixels from 0 to 255 by 255; see --help",
      command=CONVERT,
    ),
    Case(
      "An unknown network of Keras",
      "keras:ResNet5 out.safetensors",
      "keras.applications has no network 'ResNet5'; did you mean ResNet50 or "
      "ResNet152 or ResNet50V2?",
      command=CONVERT,
      needs="keras",
    ),
    Case(
      "A pickle that tries to run code",
      "in.pth out.safetensors --model=resnet_tiny",
      "in.pth cannot be read safely (weights_only): it asks to run exec, "
      "and its code is never run; save a state_dict() of tensors alone",
      _pickle,
      command=CONVERT,
      needs="torch",
    ),
  ),
  "Workdir": (
    Case(
      "A file in place of the folder",
      "",
      "cannot use --workdir=run: File exists; give a folder that can be "
      "written",
      _write("run", ""),
    ),
    Case(
      "Another run's folder",
      "",
      "run holds a run of another config: epochs was 3, is 1; use another "
      "--workdir",
      _run_of(epochs=3),
    ),
    Case(
      "A damaged config.json",
      "",
      "run/config.json is damaged (Expecting value: line 1 column 12 (char "
      "11)); mend or delete it, or use another --workdir",
      _write("run/config.json", '{"epochs": '),
    ),
    Case(
      "A folder that is read-only",
      "",
      "cannot use --workdir=run: Permission denied; give a folder that can "
      "be written",
      lambda folder: (folder / "run").mkdir(mode=0o555),
      code=CANNOT,
    ),
    Case(
      "No folder named",
      "--workdir=",
      "--workdir must name a folder",
    ),
    Case(
      "A folder without a run",
      "run data.npz",
      "there is no target.safetensors in run; a run leaves it with its "
      "first epoch",
      command=PREDICT,
    ),
    Case(
      "A report of a folder without a run",
      "run",
      "there is no run in run: no config.json of a run; name the --workdir of"
      " train.py or of a table",
      command=REPORT,
    ),
  ),
  "Accepted": (
    Case(
      "Grey images for a network for RGB images",
      _RGB,
      "converted: three equal channels",
      _pictures(mode="L"),
      code=0,
    ),
    Case(
      "Images with transparency (RGBA)",
      _RGB,
      "converted to RGB: transparency is dropped",
      _pictures(mode="RGBA"),
      code=0,
    ),
    Case(
      "16-bit images",
      _RGB,
      "scaled to 8 bits; the maximum of the training images decides what is "
      "white",
      _pictures(mode="I;16"),
      code=0,
    ),
    Case(
      "Colour images for a network for grey images",
      f"{_FOLDER} {_SCRATCH}",
      "converted to luminance",
      _pictures(),
      code=0,
    ),
  ),
}

if __name__ == "__main__":
  print(page(), end="")
