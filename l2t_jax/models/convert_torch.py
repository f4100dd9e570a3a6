"""Networks of timm and of any PyTorch code as exportable pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import contextlib
import functools
import io
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from l2t_jax import errors, imports
from l2t_jax.models import blocks, checkpoints, programs, tapping

# (Axes that grow with the image's height, those with its width) -> axis order.
_ORDERS = {
  ((1,), (2,)): "CHW",
  ((0,), (1,)): "HWC",
  ((0,), (0,)): "NC",
  ((1,), (1,)): "CN",
}
_BATCH = 2  # torch.export would specialise on a batch of one image.


def from_timm(
  name: str,
  checkpoint: pathlib.Path | None,
  key: str,
  reading: programs.Reading,
) -> programs.Exportable:
  """Create a timm network; its taps are the maps of `forward_intermediates`.

  Networks without this method are tapped at each submodule, by hooks.

  Args:
    name: such as "convnext_tiny.fb_in1k".
    checkpoint: weights of that architecture; None to let timm download them.
    key: see `checkpoints.read`.
    reading: image size and normalisation, where not the network's defaults.

  Raises:
    errors.InputError: timm is not installed or knows no such network, weights
      cannot be downloaded, or the checkpoint does not fit.
  """
  torch = _require_torch(f"timm:{name}")
  timm = imports.require("timm", needed_for=f"timm:{name}")
  architecture = name.partition(".")[0]
  if not timm.is_model(architecture):
    raise errors.InputError(
      f"timm {timm.__version__} has no network {architecture!r}"
      f"{programs.did_you_mean(architecture, timm.list_models())}"
    )

  def make(**options):
    try:
      if reading.image_size:
        # Convolutional networks take any size and have no such argument.
        with contextlib.suppress(TypeError):
          return timm.create_model(name, img_size=reading.image_size, **options)
      return timm.create_model(name, **options)
    except Exception as error:  # Networks and hubs raise errors of any type.
      hint = "" if checkpoint else "; --checkpoint=FILE takes weights you have"
      raise errors.InputError(
        f"timm cannot make {name!r}: {errors.in_one_line(error)}{hint}"
      ) from error

  if checkpoint:
    module, notes, _ = _load(make, checkpoint, key)
  else:
    module, notes = make(pretrained=True), ()
  own = module.pretrained_cfg
  reading = reading.or_else(own["input_size"][-1], own["mean"], own["std"])
  default: tuple[str, ...] = ()
  if hasattr(module, "forward_intermediates"):
    names = [entry["module"] for entry in module.feature_info]

    def forward(images):
      last, maps = module.forward_intermediates(images, output_fmt="NCHW")
      return module.forward_head(last), *(x.permute(0, 2, 3, 1) for x in maps)

  else:
    forward, maps = _with_hooks(torch, module, reading.image_size)
    names, default = list(maps), _default_taps(module, maps, reading)
  class_names: tuple[str, ...] = ()
  if not checkpoint and (subset := timm.data.infer_imagenet_subset(module)):
    class_names = tuple(timm.data.ImageNetInfo(subset).label_names())
  return _export(torch, module, forward, names, reading)._replace(
    notes=notes,
    default_taps=default,
    metadata={
      "class_names": json.dumps(class_names),
      "interpolation": own.get("interpolation") or "",
      "licence": own.get("license") or "",
      "versions": _versions(torch, timm),
      **({} if module.num_classes else {"num_classes": "0"}),
    },
  )


def from_module(
  name: str,
  checkpoint: pathlib.Path | None,
  key: str,
  reading: programs.Reading,
) -> programs.Exportable:
  """Create a network from any PyTorch code; each submodule's map is a tap.

  Args:
    name: "package.module:function"; the function returns a `torch.nn.Module`.
    checkpoint: the weights; None if the function loads them itself.
    key: see `checkpoints.read`.
    reading: image size and normalisation; by default those of ImageNet for
      networks of torchvision.

  Raises:
    errors.InputError: the function or its result cannot be used, the checkpoint
      does not fit, or `reading` is incomplete.
  """
  torch = _require_torch(f"torch:{name}")
  if not all(name.partition(":")[::2]):
    raise errors.InputError(
      f"torch:{name} names no function; give torch:package.module:function,"
      " where the function returns a torch.nn.Module"
    )
  if name.startswith("torchvision."):
    reading = reading.or_else(224, *programs.IMAGENET)
  if missing := [f for f in reading._fields if not getattr(reading, f)]:
    raise errors.InputError(
      f"torch:{name}: give {' and '.join(f'--{field}' for field in missing)} of"
      " the images that it was trained on (--mean=0 --std=1 if it normalises"
      " them itself)"
    )
  function = imports.by_name(name, "network")

  def make(**options):
    try:
      module = function(**options)
    except Exception as error:  # A user's function may raise any error.
      raise errors.InputError(
        f"{name} cannot be called: {errors.in_one_line(error)}"
      ) from error
    if not isinstance(module, torch.nn.Module):
      raise errors.InputError(
        f"{name} returned a {type(module).__name__}; it must return a"
        " torch.nn.Module"
      )
    if isinstance(module, torch.jit.ScriptModule):
      raise errors.InputError(
        f"{name} returned TorchScript; give a function that makes the module"
        " itself, with the weights as --checkpoint"
      )
    # Unwrap what torch.compile and nn.DataParallel return.
    module = getattr(module, "_orig_mod", module)
    parallel = isinstance(module, torch.nn.DataParallel)
    return module.module if parallel else module

  if checkpoint:
    module, notes, found = _load(make, checkpoint, key)
  else:
    module, found = make(), {}
    notes = (f"weights: those that {name} returned; no --checkpoint was given",)
  module.float()
  forward, maps = _with_hooks(torch, module, reading.image_size)
  default = _default_taps(module, maps, reading)
  return _export(torch, module, forward, list(maps), reading)._replace(
    notes=notes,
    default_taps=default,
    metadata={"class_names": "[]", "versions": _versions(torch), **found},
  )


def _require_torch(what):
  """Import torch, and check that torchax is installed."""
  torch = imports.require("torch", needed_for=what)
  if not imports.is_installed("torchax"):  # Importing it modifies torch.
    imports.require("torchax", needed_for=what)
  return torch


def _load(make: Callable[..., Any], checkpoint: pathlib.Path, key: str):
  """Make a module with a checkpoint's number of classes and load its weights.

  Returns:
    (module, notes for the user, metadata); the metadata says that there are 0
    classes if the checkpoint has no classifier.
  """
  module, without = make(), {}
  shapes = {n: tuple(x.shape) for n, x in module.state_dict().items()}
  read = checkpoints.without_prefix(checkpoints.read(checkpoint, key), shapes)
  tensors = read.tensors
  # (classes in the checkpoint, in the module), from the tensors that differ in
  # their first axis alone.
  others = {
    (tensors[name].shape[0], shape[0])
    for name, shape in shapes.items()
    if name in tensors
    and tensors[name].shape != shape
    and tensors[name].shape[1:] == shape[1:]
    and shape
  }
  if len(others) == 1:
    ((num_classes, _),) = others
    with contextlib.suppress(errors.InputError):  # It has no such argument.
      module = make(num_classes=num_classes)
  if _missing(module, tensors):
    # Tensors are missing: perhaps the checkpoint has no classifier.
    with contextlib.suppress(errors.InputError):
      backbone = make(num_classes=0)
      if not _missing(backbone, tensors):
        module, without = backbone, {"num_classes": "0"}
  state = module.state_dict()
  if missing := _missing(module, tensors):
    raise errors.InputError(
      f"{checkpoint} does not fit the network: {missing[0]} is missing,"
      f" expected {list(state[missing[0]].shape)}"
    )
  for name in state.keys() & tensors.keys():
    found, expected = list(tensors[name].shape), list(state[name].shape)
    if found != expected:
      raise errors.InputError(
        f"{checkpoint} does not fit the network: {name} is {found}, expected"
        f" {expected}"
      )
  torch = imports.require("torch", needed_for=f"reading {checkpoint.name}")
  module.load_state_dict(
    {n: torch.from_numpy(tensors[n]) for n in state if n in tensors},
    strict=False,
  )
  linear = {
    name
    for name, submodule in module.named_modules()
    if isinstance(submodule, torch.nn.Linear)
  }
  left_over = checkpoints.left_over(
    tensors, state.keys() & tensors.keys(), linear
  )
  notes = (*read.notes, *(f"left over: {name}" for name in left_over))
  return module, notes, without


def _missing(module, tensors):
  """Return the names of a module's tensors that a checkpoint lacks.

  Counters of batches may be missing, and so may a tensor that shares its memory
  with another: safetensors files store such memory once.
  """
  state = module.state_dict()
  stored = {x.data_ptr() for name, x in state.items() if name in tensors}
  return [
    name
    for name, x in state.items()
    if name not in tensors
    and not name.endswith("num_batches_tracked")
    and x.data_ptr() not in stored
  ]


class _Map(NamedTuple):
  """How the output of a submodule becomes a map."""

  convert: Callable[[Any], Any]  # Output -> [B, H, W, C].
  shape: tapping.Shape  # (H, W, C).


def _with_hooks(torch, module, image_size):
  """Return (images -> (output, *maps), submodule -> `_Map`)."""
  maps = _find_maps(torch, module, image_size)

  def forward(images):
    with _outputs(module) as outputs:
      logits = module(images)
    return logits, *(x.convert(outputs[name]) for name, x in maps.items())

  return forward, maps


def _default_taps(module, maps, reading):
  """Choose default taps from the tree of submodules.

  Names of taps do not show this tree: "stages.1" becomes "stages_1".
  """
  path = lambda name: name.replace(".", "/")
  proposed = blocks.propose_taps(
    {path(name): x.shape for name, x in maps.items()},
    [path(n) for n, _ in module.named_modules() if n and n not in maps],
    (reading.image_size, reading.image_size, 3),
  )
  taps = zip(map(path, maps), _tap_names(list(maps)), strict=True)
  return tuple(tap for name, tap in taps if name in proposed)


@contextlib.contextmanager
def _outputs(module):
  """Context manager: collect the first output of each submodule, by name."""
  outputs: dict[str, Any] = {}

  def keep_as(name):
    def keep(submodule, inputs, output):
      # Cloned, since a later operation may change the output in place. The hook
      # returns None, because any other value would replace the output.
      is_tensor = hasattr(output, "clone")
      outputs.setdefault(name, output.clone() if is_tensor else output)

    return keep

  handles = [
    submodule.register_forward_hook(keep_as(name))
    for name, submodule in module.named_modules()
    if name
  ]
  try:
    yield outputs
  finally:
    for handle in handles:
      handle.remove()


def _find_maps(torch, module, image_size) -> dict[str, _Map]:
  """Return submodule -> how its output becomes a map.

  The axes of rows and columns are those that grow when the network runs on an
  image that is twice as high or twice as wide. If the network accepts a single
  size only, the order of axes is guessed from the type of the submodule.
  """

  def shapes(height, width):
    images = torch.zeros(_BATCH, 3, height, width)
    with torch.no_grad(), _outputs(module) as outputs:
      logits = module(images)
    if not isinstance(logits, torch.Tensor):
      raise errors.InputError(
        f"the network returns a {type(logits).__name__}; it must return logits,"
        " [B, K]: give a function that makes a module which picks them out"
      )
    return {
      name: tuple(x.shape[1:])
      for name, x in outputs.items()
      if isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == _BATCH
    }

  module.eval()
  try:
    usual = shapes(image_size, image_size)
  except errors.InputError:
    raise
  except Exception as error:  # A user's network may raise any error.
    raise errors.InputError(
      f"the network cannot be run on images [B, 3, {image_size}, {image_size}]:"
      f" {errors.in_one_line(error)}"
    ) from error
  high = wide = None
  with contextlib.suppress(Exception):  # Networks of a fixed size raise here.
    high = shapes(2 * image_size, image_size)
    wide = shapes(image_size, 2 * image_size)
  if high == wide == usual:  # The network resizes its images.
    high = wide = None
  submodules = dict(module.named_modules())
  maps: dict[str, _Map] = {}
  grids: list[tuple[int, int]] = []
  for name, shape in usual.items():
    if high is None or wide is None:
      order = _order_by_kind(torch, submodules[name], shape)
    else:
      order = _ORDERS.get(
        (_changed(shape, high.get(name)), _changed(shape, wide.get(name)))
      )
    if order == "CHW":
      maps[name] = _Map(lambda x: x.permute(0, 2, 3, 1), (*shape[1:], shape[0]))
      grids.append(shape[1:])
    elif order == "HWC":
      maps[name] = _Map(lambda x: x, shape)
      grids.append(shape[:2])
    elif order in ("NC", "CN") and len(shape) == 2:
      count = shape[order.index("N")]
      if grid := tapping.find_grid(count, grids):
        convert = functools.partial(_tokens_to_map, order=order, grid=grid)
        num_channels = shape[order.index("C")]
        maps[name] = _Map(convert, (grid.height, grid.width, num_channels))
  return maps


def _changed(shape, other):
  """Return the axes in which two shapes differ; None if the ranks differ."""
  if other is None or len(shape) != len(other):
    return None
  return tuple(
    i for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b
  )


def _order_by_kind(torch, submodule, shape):
  """Guess the order of axes from the type of a submodule."""
  nn = torch.nn
  maps = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample),
  )
  sequences = (nn.Conv1d, nn.BatchNorm1d)
  if len(shape) == 2:
    return "CN" if isinstance(submodule, sequences) else "NC"
  if len(shape) != 3:
    return None
  if isinstance(submodule, maps):
    return "CHW"
  # Of a square map, the axis of another length is that of the channels.
  has_maps = any(isinstance(inner, maps) for inner in submodule.modules())
  if has_maps and shape[1] == shape[2] != shape[0]:
    return "CHW"
  return "HWC" if shape[0] == shape[1] != shape[2] else None


def _tokens_to_map(x, *, order, grid):
  """Convert tokens [B, N, C] or [B, C, N] to a map [B, H, W, C]."""
  return tapping.to_grid(x if order == "NC" else x.transpose(1, 2), grid)


def _export(torch, module, forward, names, reading) -> programs.Exportable:
  """Trace a module with a variable batch size.

  Args:
    torch: the library.
    module: the module that `forward` runs.
    forward: normalised images [B, 3, S, S] -> (logits, *maps).
    names: names of the maps; generic ones are used if the number is different.
    reading: image size and normalisation.
  """
  # Imported late, because this modifies torch.
  import torchax
  from torchax import export

  torchax.default_env()  # Registers the JAX versions of torch's operations.

  class WithFeatures(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.module = module

    def forward(self, images):
      constant = lambda values: torch.tensor(values, dtype=images.dtype)
      images = (images - constant(reading.mean)) / constant(reading.std)
      return tuple(forward(images.permute(0, 3, 1, 2)))

  shape = (_BATCH, reading.image_size, reading.image_size, 3)
  batch = torch.export.Dim("batch", min=1)
  whole = WithFeatures().eval().float()
  try:
    # On failure torch prints the whole graph to stderr.
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
      traced = torch.export.export(
        whole, (torch.zeros(shape),), dynamic_shapes=({0: batch},), strict=False
      ).run_decompositions()  # Reorders the inputs of the graph.
      names_of_states, states, call = export.exported_program_to_jax(
        traced, export_raw=True
      )
    signature = traced.graph_signature
    by_name = dict(
      zip(
        (*names_of_states, *signature.lifted_tensor_constants),
        states,
        strict=True,
      )
    )
  except Exception as error:  # torch raises many types of tracing errors.
    raise errors.InputError(
      f"torch.export cannot trace the network: {errors.first_line(error)};"
      f" {programs.HOW_TO_BE_TRACED}"
    ) from error
  num_maps = len(signature.user_outputs) - 1
  if len(names) != num_maps:
    names = [f"features.{index}" for index in range(num_maps)]
  # In the order of the graph; torchax returns constants last.
  inputs = [x for x in signature.input_specs if x.target is not None]
  arrays = [by_name[x.target].detach().cpu().numpy() for x in inputs]
  # Constants, such as tables of positions, become part of the program.
  constant = torch.export.graph_signature.InputKind.CONSTANT_TENSOR
  params = {
    index: x.target.removeprefix("module.")
    for index, x in enumerate(inputs)
    if np.issubdtype(arrays[index].dtype, np.floating) and x.kind != constant
  }

  def apply(given, images):
    values = [
      given[params[index]] if index in params else jnp.asarray(array)
      for index, array in enumerate(arrays)
    ]
    return tuple(call(values, (images,)))

  def reference(images):
    with torch.no_grad():
      images = (images - np.float32(reading.mean)) / np.float32(reading.std)
      images = torch.from_numpy(images.transpose(0, 3, 1, 2))
      return module(images).numpy()

  return programs.Exportable(
    apply,
    {name: arrays[index] for index, name in params.items()},
    reference,
    reading.image_size,
    _tap_names(names),
  )


def _tap_names(names: Sequence[str]) -> tuple[str, ...]:
  """Convert names to those of Flax: "stages.1.conv" becomes "stages_1/conv".

  Repetitions of a name become "name#1" and so on.
  """
  taps: list[str] = []
  for index, name in enumerate(names):
    tap = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).replace(".", "/")
    tap = tap or f"features_{index}"
    same = sum(other.partition("#")[0] == tap for other in taps)
    taps.append(f"{tap}#{same}" if same else tap)
  return tuple(taps)


def _versions(*libraries):
  """Return the versions of libraries as JSON."""
  return json.dumps({one.__name__: one.__version__ for one in libraries})
