"""The content of transfer_map.json: what a run transferred, and from where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from l2t_jax import errors

FILE = "transfer_map.json"  # In the folder of a run.
_IGNORED = 0.05  # A pair with a smaller weight is ignored.
_TOP_CHANNELS = 5  # Number of channels listed per pair.

# A tap: its name and the shape (H, W, C) of its feature map.
Tap = tuple[str, tuple[int, int, int]]
# An entry of "pairs" in the map.
Pair = Mapping[str, Any]


class Setting(NamedTuple):
  """What a transfer map records about a run, in addition to the weights."""

  method: str
  source_taps: Sequence[Tap]  # Input side first.
  target_taps: Sequence[Tap]
  # Names of the sources if there are several: the names of their taps then
  # start with "SOURCE/".
  sources: Sequence[str] = ()
  frozen: bool = False  # Whether all weights were taken from another map.
  maximum: float = 6.0  # Upper bound of learned pair weights, or inf.
  # Source tap -> divisor of its features; {} if they were not scaled.
  scales: Mapping[str, float] = {}


def strongest_first(content: Mapping[str, Any]) -> list[Pair]:
  """Sort a map's pairs by decreasing pair weight.

  Pairs of equal weight are sorted by the share of channels that matter,
  smallest first.
  """
  share = lambda pair: pair["channel_concentration"] / pair["num_channels"]
  rank = lambda pair: (-pair["pair_weight"], share(pair))
  return sorted(content["pairs"], key=rank)


def scales_of(content: Mapping[str, Any]) -> dict[str, float]:
  """Return source tap -> divisor of its features; {} if not scaled."""
  taps = content["source_taps"]
  return {tap["name"]: tap["scale"] for tap in taps if "scale" in tap}


def pair_name(pair: Pair) -> str:
  """Return the name of a pair as pictures and pages show it."""
  return f"{pair['source']} → {pair['target']}"


def learned(content: Mapping[str, Any]) -> tuple[bool, bool]:
  """Return whether a map's pair weights and channel weights were learned."""
  return (
    not (content["frozen"] or content["fixed"]),
    not (content["frozen"] or content["channels_fixed"]),
  )


def is_ignored(content: Mapping[str, Any], pair: Pair) -> bool:
  """Return whether a pair of a map has a weight near 0.

  That is less than 5 % of 1, or, where 1 is the sum of the weights of a source
  layer (AFD), of their mean.
  """
  whole = 1
  if content["maximum"] == 1:
    whole = sum(p["source"] == pair["source"] for p in content["pairs"])
  return pair["pair_weight"] < _IGNORED / whole


def effective_channels(weights: np.ndarray) -> float:
  """Count the channels that matter: exp of the entropy of the weights.

  Args:
    weights: [C], not negative; scaled here to sum to 1.

  Returns:
    Between 1 (one channel has all the weight) and C (all count the same).
  """
  p = np.asarray(weights, np.float64)
  p = p[p > 0] / p.sum()
  return float(np.exp(-np.sum(p * np.log(p))))


def collect(
  setting: Setting,
  epochs: Sequence[Mapping[str, Any]],
  channel_weights: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Collect what a run learned, as the content of `transfer_map.json`.

  Args:
    setting: of the run.
    epochs: the records of kind "epoch", one per epoch.
    channel_weights: "source->target" -> [C_m], mean over the last epoch.

  Returns:
    A JSON-able dict: method, source_taps, target_taps, epochs, fixed (pair
    weights stayed exactly 1), channels_fixed (channel weights are uniform),
    frozen, maximum (None for none), pairs, in the order of the last
    epoch's record, and, with several sources, source_shares (source -> its
    pairs' share of the sum of pair weights).

  Raises:
    InputError: no epoch has pair weights, or some are missing or not finite.
  """
  by_epoch = {r["epoch"]: r for r in epochs if r.get("pair_weights")}
  if not by_epoch:
    raise errors.InputError(
      f"No epoch of this {setting.method!r} run has pair weights: only a method"
      " that matches features, after at least one epoch, has a transfer map."
    )
  records = [by_epoch[number] for number in sorted(by_epoch)]
  taps_of = {
    f"{source}->{target}": {"source": source, "target": target}
    for source, _ in setting.source_taps
    for target, _ in setting.target_taps
  }
  pairs = [
    {
      **taps_of[key],
      **_pair_fields(key, records),
      **_channel_fields(key, channel_weights[key]),
    }
    for key in records[-1]["pair_weights"]
  ]
  taps = lambda side, scales: [
    {"name": name, "shape": list(shape)}
    | ({"scale": scales[name]} if name in scales else {})
    for name, shape in side
  ]
  content = {
    "method": setting.method,
    "source_taps": taps(setting.source_taps, setting.scales),
    "target_taps": taps(setting.target_taps, {}),
    "epochs": sorted(by_epoch),
    "fixed": all(np.allclose(p["history"], 1, atol=1e-6) for p in pairs),
    "channels_fixed": all(
      np.allclose(channel_weights[key], np.mean(channel_weights[key]), 1e-5, 0)
      for key in records[-1]["pair_weights"]
    ),
    "frozen": setting.frozen,
    "maximum": setting.maximum if math.isfinite(setting.maximum) else None,
    "pairs": pairs,
  }
  if setting.sources:
    content["source_shares"] = {
      name: sum(p["share"] for p in pairs if p["source"].startswith(f"{name}/"))
      for name in setting.sources
    }
  return content


def _pair_fields(key, records) -> dict[str, Any]:
  """Return a pair's weight in each epoch, and its share of the total."""
  history = [float(r["pair_weights"].get(key, np.nan)) for r in records]
  _check_finite(key, history)
  total = sum(records[-1]["pair_weights"].values())
  return {
    "pair_weight": history[-1],
    "share": history[-1] / total if total else 0.0,
    "history": history,
    "matching_distance": records[-1].get("matching_distances", {}).get(key),
  }


def _channel_fields(key, weights) -> dict[str, Any]:
  """Return a pair's channel weights, and the channels with the largest."""
  weights = np.asarray(weights, np.float64)
  num_channels = len(weights)
  _check_finite(key, weights)
  # A stable sort keeps equal channels in their own order.
  top = np.argsort(-weights, kind="stable")[:_TOP_CHANNELS]
  return {
    "top_channels": [
      {
        "channel": int(c),
        "weight": float(weights[c]),
        "uniform": 1 / num_channels,
      }
      for c in top
    ],
    "num_channels": num_channels,
    "channel_concentration": effective_channels(weights),
    "channel_weights": weights.tolist(),
  }


def _check_finite(key, weights) -> None:
  if not np.isfinite(weights).all():
    raise errors.InputError(
      f"Pair {key!r} has weights that are missing or not finite; "
      "the run diverged, or its metrics.jsonl mixes two runs."
    )


def read_weights(
  path: pathlib.Path | str,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """Read the weights of a `transfer_map.json`, to use them as fixed weights.

  Args:
    path: the file.

  Returns:
    (channel, pair), both in the file's order: "source->target" -> channel
    weights [C_m], which sum to 1; and "source->target" -> pair weight.

  Raises:
    InputError: the file is missing, is not a transfer map, or holds weights
      that no run can have.
  """
  path = pathlib.Path(path)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise errors.InputError(
      f"{path} cannot be read ({error.strerror}); name the transfer_map.json "
      "of a finished run."
    ) from error
  except ValueError as error:
    raise errors.InputError(f"{path} is not JSON ({error}).") from error
  pairs = content.get("pairs") if isinstance(content, dict) else None
  if not pairs or not isinstance(pairs, list):
    raise errors.InputError(
      f'{path} has no "pairs"; name the transfer_map.json of a finished run.'
    )
  channel, weight = {}, {}
  for number, pair in enumerate(pairs, start=1):
    try:
      name = f"{pair['source']}->{pair['target']}"
      channel[name], weight[name] = _read_pair(pair)
    except (KeyError, TypeError, ValueError) as error:
      raise errors.InputError(
        f"{path}: pair {number} is not as a run writes it ({error}); each needs"
        " a source, a target, a pair_weight of 0 or more, and num_channels"
        " channel_weights of 0 or more that sum to 1."
      ) from error
  # A pair that is listed twice has overwritten its first entry.
  if len(channel) < len(pairs):
    raise errors.InputError(f"{path} holds a pair twice; delete one of them.")
  if not any(weight.values()):
    raise errors.InputError(
      f"{path}: all pair weights are 0; that run ended without any transfer."
    )
  return channel, weight


def read_scales(path: pathlib.Path | str) -> dict[str, float]:
  """Return the divisors of a map's source features; see `scales_of`.

  Args:
    path: a file that `read_weights` accepts.
  """
  content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  return scales_of(content) if "source_taps" in content else {}


def _read_pair(pair: Pair) -> tuple[np.ndarray, float]:
  """Return (channel weights, pair weight) of an entry, or raise.

  Users may edit the file: the errors become part of a message to them.
  """
  weights = np.asarray(pair["channel_weights"], np.float64)
  weight = np.asarray(pair["pair_weight"], np.float64)
  if weight.shape or weights.shape != (pair["num_channels"],):
    raise ValueError(
      f"shapes are {weight.shape} and {weights.shape}, not () and"
      f" ({pair['num_channels']},)"
    )
  # Not `weight < 0 or ...`: comparisons with NaN are false.
  if not (0 <= weight < np.inf and (weights >= 0).all()):
    raise ValueError("a weight is negative or not finite")
  if not abs(weights.sum() - 1) <= 1e-3:
    raise ValueError(f"channel_weights sum to {weights.sum():.4g}")
  return weights, float(weight)
