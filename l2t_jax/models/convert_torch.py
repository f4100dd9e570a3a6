"""Networks of timm and of any torch code, ready to be exported."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import functools
import json
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from l2t_jax import errors, imports
from l2t_jax.models import checkpoints, programs, tapping

_MAX_REASON = 200  # Characters of another library's error.
_COUNTER = "num_batches_tracked"  # Nothing in evaluation depends on it.
_BATCH = 2  # torch.export takes a batch of one image for a constant.


def from_timm(
  name: str,
  checkpoint: pathlib.Path | None,
  key: str,
  reading: programs.Reading,
) -> programs.Exportable:
  """Create a network of timm; its taps are what `forward_intermediates` gives.

  Args:
    name: such as "convnext_tiny.fb_in1k".
    checkpoint: weights of that architecture; None for timm to download them.
    key: see `checkpoints.read`.
    reading: of the images, where it is not the network's own.

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
        with contextlib.suppress(TypeError):  # Convolutions take any size.
          return timm.create_model(name, img_size=reading.image_size, **options)
      return timm.create_model(name, **options)
    except Exception as error:  # Networks and hubs raise anything.
      hint = "" if checkpoint else "; --checkpoint=FILE takes weights you have"
      raise errors.InputError(
        f"timm cannot make {name!r}: {_in_one_line(error)}{hint}"
      ) from error

  if checkpoint:
    module, notes, _ = _load(make, checkpoint, key)
  else:
    module, notes = make(pretrained=True), ()
  own = module.pretrained_cfg
  reading = reading.or_else(own["input_size"][-1], own["mean"], own["std"])
  if hasattr(module, "forward_intermediates"):
    names = [entry["module"] for entry in module.feature_info]

    def forward(images):
      last, maps = module.forward_intermediates(images, output_fmt="NCHW")
      return module.forward_head(last), *(x.permute(0, 2, 3, 1) for x in maps)

  else:
    forward, names = _with_hooks(torch, module, reading.image_size)
  class_names: tuple[str, ...] = ()
  if not checkpoint and (subset := timm.data.infer_imagenet_subset(module)):
    class_names = tuple(timm.data.ImageNetInfo(subset).label_names())
  return _export(torch, module, forward, names, reading)._replace(
    notes=notes,
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
  """Create a network of any torch code; the map of each submodule is a tap.

  Args:
    name: "package.module:function"; the function returns a `torch.nn.Module`.
    checkpoint: its weights; None if the function loads them.
    key: see `checkpoints.read`.
    reading: of the images; that of ImageNet for networks of torchvision.

  Raises:
    errors.InputError: the function or its result cannot be used, the checkpoint
      does not fit, or the images are not described.
  """
  torch = _require_torch(f"torch:{name}")
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
    except Exception as error:  # A user's function may raise anything.
      raise errors.InputError(
        f"{name} cannot be called: {_in_one_line(error)}"
      ) from error
    if not isinstance(module, torch.nn.Module):
      raise errors.InputError(
        f"{name} returned a {type(module).__name__}; it must return a"
        " torch.nn.Module"
      )
    return module

  if checkpoint:
    module, notes, found = _load(make, checkpoint, key)
  else:
    module, notes, found = make(), (), {}
  forward, names = _with_hooks(torch, module, reading.image_size)
  return _export(torch, module, forward, names, reading)._replace(
    notes=notes,
    metadata={"class_names": "[]", "versions": _versions(torch), **found},
  )


def _require_torch(what):
  torch = imports.require("torch", needed_for=what)
  imports.require("torchax", needed_for=what)
  return torch


def _load(make: Callable[..., Any], checkpoint: pathlib.Path, key: str):
  """Make a module with the number of classes of a checkpoint, and fill it.

  Returns:
    The module; what is to be said, one line each; and metadata: a number of
    classes of 0 where the checkpoint has no classifier.
  """
  module, without = make(), {}
  shapes = {n: tuple(x.shape) for n, x in module.state_dict().items()}
  read = checkpoints.without_prefix(checkpoints.read(checkpoint, key), shapes)
  tensors = read.tensors
  # (classes of the checkpoint, classes of the module) of each other shape.
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
  if not tensors.keys() >= {n for n in shapes if not n.endswith(_COUNTER)}:
    with contextlib.suppress(errors.InputError):
      backbone = make(num_classes=0)
      if tensors.keys() >= dict(backbone.named_parameters()).keys():
        module, without = backbone, {"num_classes": "0"}
  state = module.state_dict()
  for name, value in state.items():
    if name.endswith(_COUNTER):
      continue
    found = list(tensors[name].shape) if name in tensors else "missing"
    if found != list(value.shape):
      raise errors.InputError(
        f"{checkpoint} does not fit the network: {name} is {found}, expected"
        f" {list(value.shape)}"
      )
  torch = imports.require("torch", needed_for=f"reading {checkpoint.name}")
  module.load_state_dict(
    {n: torch.from_numpy(tensors[n]) for n in state if n in tensors},
    strict=False,
  )
  left_over = [name for name in tensors if name not in state]
  notes = (*read.notes, *(f"left over: {name}" for name in left_over))
  return module, notes, without


def _with_hooks(torch, module, image_size):
  """Return (images -> (output, *maps), names of the submodules with maps)."""
  to_maps = _find_maps(torch, module, image_size)

  def forward(images):
    with _outputs(module) as outputs:
      logits = module(images)
    return logits, *(to_map(outputs[name]) for name, to_map in to_maps.items())

  return forward, list(to_maps)


@contextlib.contextmanager
def _outputs(module):
  """Context manager: collect the first output of each submodule, by name."""
  outputs: dict[str, Any] = {}

  def keep_as(name):
    def keep(submodule, inputs, output):
      outputs.setdefault(name, output)  # Returned, it would replace the output.

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


def _find_maps(torch, module, image_size) -> dict[str, Callable[[Any], Any]]:
  """Return submodule -> function from its output to a map [B, H, W, C].

  Which axes are positions shows in a second image, twice as wide. In a network
  that takes one size alone they are the two of equal length.
  """

  def shapes(width):
    images = torch.zeros(_BATCH, 3, image_size, width)
    with torch.no_grad(), _outputs(module) as outputs:
      module(images)
    return {
      name: tuple(x.shape[1:])
      for name, x in outputs.items()
      if isinstance(x, torch.Tensor) and len(x) == _BATCH and x.numel()
    }

  module.eval()
  try:
    square, wide = shapes(image_size), {}
  except Exception as error:  # A user's network may raise anything.
    raise errors.InputError(
      f"the network cannot be run on images [B, 3, {image_size}, {image_size}]:"
      f" {_in_one_line(error)}"
    ) from error
  with contextlib.suppress(Exception):  # A network of one size refuses others.
    wide = shapes(2 * image_size)
  to_maps: dict[str, Callable[[Any], Any]] = {}
  grids: list[tuple[int, int]] = []
  for name, shape in square.items():
    if len(shape) == 2 and (found := tapping.find_grid(shape[0], grids)):
      to_maps[name] = functools.partial(tapping.to_grid, grid=found)
    if len(shape) != 3:
      continue
    changed = [
      a != b for a, b in zip(shape, wide.get(name, shape), strict=True)
    ]
    if not any(changed):
      changed = [False, shape[0] == shape[1], shape[1] == shape[2]]
    if changed == [False, False, True]:
      to_maps[name] = lambda x: x.permute(0, 2, 3, 1)
      grids.append(shape[1:])
    elif changed == [False, True, False]:
      to_maps[name] = lambda x: x
      grids.append(shape[:2])
  return to_maps


def _export(torch, module, forward, names, reading) -> programs.Exportable:
  """Trace a module for any size of the batch.

  Args:
    torch: the library.
    module: what `forward` runs.
    forward: normalised images [B, 3, S, S] -> (logits, *maps).
    names: of the maps; where there is another number of them, they are counted.
    reading: of the images.
  """
  import torchax
  from torchax import export

  torchax.default_env()  # Registers what operations of torch are in JAX.

  class WithFeatures(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.module = module
      for name in ("mean", "std"):
        values = torch.tensor(getattr(reading, name))
        self.register_buffer(name, values, persistent=False)

    def forward(self, images):
      images = (images - self.mean) / self.std
      return tuple(forward(images.permute(0, 3, 1, 2)))

  shape = (_BATCH, reading.image_size, reading.image_size, 3)
  batch = torch.export.Dim("batch", min=1)
  whole = WithFeatures().eval()
  try:
    with torch.no_grad():
      traced = torch.export.export(
        whole, (torch.zeros(shape),), dynamic_shapes=({0: batch},), strict=False
      )
      variables, states, call = export.exported_program_to_jax(
        traced, export_raw=True
      )
  except Exception as error:  # torch raises anything for what it cannot trace.
    raise errors.InputError(
      f"torch.export cannot trace the network: {_in_one_line(error)}"
    ) from error
  arrays = [state.detach().cpu().numpy() for state in states]
  num_maps = len(traced.graph_signature.user_outputs) - 1
  if len(names) != num_maps:
    names = [f"features.{index}" for index in range(num_maps)]
  # Tables of positions and the like become constants of the program.
  params = {
    index: name.removeprefix("module.")
    for index, name in enumerate(variables)
    if np.issubdtype(arrays[index].dtype, np.floating)
  }

  def apply(given, images):
    values = [
      given[params[index]] if index in params else jnp.asarray(array)
      for index, array in enumerate(arrays)
    ]
    return tuple(call(values, (images,)))

  def reference(images):
    with torch.no_grad():
      images = (torch.from_numpy(images) - whole.mean) / whole.std
      return module(images.permute(0, 3, 1, 2)).numpy()

  return programs.Exportable(
    apply,
    {name: arrays[index] for index, name in params.items()},
    reference,
    reading.image_size,
    tuple(map(_tap_name, names)),
  )


def _in_one_line(error):
  reason = " ".join(str(error).split())
  return f"{type(error).__name__}: {reason[:_MAX_REASON]}"


def _tap_name(name):
  """Name a submodule as in JAX: "stages.1.conv" becomes "stages_1/conv"."""
  return re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).replace(".", "/")


def _versions(*libraries):
  return json.dumps({one.__name__: one.__version__ for one in libraries})
