"""The transfer map's content, its picture, and reading metrics.jsonl."""

import copy
import itertools
import json

import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from l2t_jax.results import map_picture, style, transfer_map
from l2t_jax.runtime import run_folder
from tests.support import pictures

SOURCE = [(f"stage{i}", (32 >> i, 32 >> i, 16 << i)) for i in range(3)]
TARGET = [(f"pool{i}", (32 >> i, 32 >> i, 64)) for i in range(5)]
FOUR = [(f"layer{i}", (56 >> i, 56 >> i, 64 << i)) for i in range(4)]
LONG = [
  (f"encoder/group${i}/residual_unit_{i}/activation", (8, 8, 16))
  for i in range(4)
]


def _several(taps, *names):
  return [(f"{name}/{tap}", shape) for name in names for tap, shape in taps]


TWO = _several(SOURCE, "tiny", "imagenet_resnet34")
THREE = _several(FOUR, "tiny", "places", "a_source_with_a_$long$_name")
LONG_TWO = _several(LONG, "a_source_named_one", "a_source_named_two")


def _all(source, target):
  return [f"{s}->{t}" for (s, _), (t, _) in itertools.product(source, target)]


def _map(
  source, target, keys, *, epochs=3, learn_pairs=True, learn_w=True, **told
):
  """Return a map of made-up weights that drift away from 1."""
  rng = np.random.default_rng(0)
  drift = {key: rng.uniform(-1, 2) if learn_pairs else 0.0 for key in keys}
  records = [
    {
      "kind": "epoch",
      "epoch": e,
      "pair_weights": {k: 1 + drift[k] * e / epochs for k in keys},
      "matching_distances": {k: 0.5 * e for k in keys},
    }
    for e in range(1, epochs + 1)
  ]
  num_channels = {name: shape[-1] for name, shape in source}
  logits = {
    k: rng.normal(size=num_channels[k.split("->")[0]]) * learn_w for k in keys
  }
  weights = {k: np.exp(v) / np.exp(v).sum() for k, v in logits.items()}
  sources = dict.fromkeys(name.partition("/")[0] for name, _ in source)
  if source not in (TWO, THREE, TWO[2:4], LONG_TWO):
    sources = ()
  setting = transfer_map.Setting(
    "l2t_ww", source, target, list(sources), **told
  )
  return transfer_map.collect(setting, records, weights)


def _tiny_map(
  pair_weights, *, source_taps=("s",), sources=(), channels=(0.3, 0.7)
):
  """Return a map of one epoch, whose pairs have equal channel weights."""
  channels = np.array(channels)
  shape = (4, 4, len(channels))
  taps = [[(tap, shape) for tap in names] for names in (source_taps, ["t"])]
  setting = transfer_map.Setting("l2t_ww", *taps, sources)
  record = {"epoch": 1, "pair_weights": pair_weights}
  weights = dict.fromkeys(pair_weights, channels)
  return transfer_map.collect(setting, [record], weights)


CASES = {
  "one_pair": lambda: _map(SOURCE, TARGET, ["stage2->pool4"], epochs=200),
  "fixed": lambda: _map(
    SOURCE,
    TARGET,
    ["stage0->pool0", "stage1->pool1", "stage2->pool2"],
    learn_pairs=False,
    learn_w=False,
  ),
  "channels_only": lambda: _map(
    SOURCE, TARGET, ["stage0->pool0", "stage1->pool1"], learn_pairs=False
  ),
  "fifteen_one_epoch": lambda: _map(
    SOURCE, TARGET, _all(SOURCE, TARGET), epochs=1
  ),
  "sixteen": lambda: _map(FOUR, FOUR, _all(FOUR, FOUR), epochs=200),
  "softplus": lambda: _map(
    SOURCE, TARGET, _all(SOURCE, TARGET), maximum=np.inf
  ),
  "frozen": lambda: _map(SOURCE, TARGET, _all(SOURCE, TARGET), frozen=True),
  "long_names": lambda: _map(LONG, LONG, _all(LONG, LONG)),
  "two_sources": lambda: _map(TWO, TARGET, _all(TWO, TARGET), epochs=200),
  "three_sources": lambda: _map(THREE, FOUR, _all(THREE, FOUR)),
  "sources_of_one_tap": lambda: _map(TWO[2:4], TARGET, _all(TWO[2:4], TARGET)),
  "sources_long_names": lambda: _map(LONG_TWO, LONG, _all(LONG_TWO, LONG)),
  "sources_fixed": lambda: _map(
    TWO,
    TARGET,
    ["tiny/stage0->pool0", "imagenet_resnet34/stage2->pool2"],
    learn_pairs=False,
    learn_w=False,
  ),
}


def test_which_pairs_are_ignored():
  weights = {"a->t": 0.04, "b->t": 0.06}
  content = _tiny_map(weights, source_taps=("a", "b"))
  first, second = content["pairs"]
  assert transfer_map.is_ignored(content, first)
  assert not transfer_map.is_ignored(content, second)
  # Those of AFD are shares: 0.04 is much among 20 pairs.
  names = [f"a->t{i}" for i in range(20)]
  taps = [f"t{i}" for i in range(20)]
  content = _map(
    [("a", (4, 4, 2))], [(tap, (4, 4, 2)) for tap in taps], names, maximum=1.0
  )
  pair = dict(content["pairs"][0], pair_weight=0.04)
  assert not transfer_map.is_ignored(content, pair)
  assert transfer_map.is_ignored(content, pair | {"pair_weight": 0.002})


def test_content_of_the_map():
  keys = _all(SOURCE, TARGET)
  content = _map(SOURCE, TARGET, keys)
  pairs = content["pairs"]
  assert [f"{p['source']}->{p['target']}" for p in pairs] == keys
  assert content["epochs"] == [1, 2, 3]
  assert content["source_taps"][1] == {"name": "stage1", "shape": [16, 16, 32]}
  assert sum(p["share"] for p in pairs) == pytest.approx(1)
  total = sum(p["pair_weight"] for p in pairs)
  for pair in pairs:
    assert len(pair["history"]) == 3
    assert pair["pair_weight"] == pair["history"][-1]
    assert pair["share"] == pytest.approx(pair["pair_weight"] / total)
    assert pair["matching_distance"] == 1.5
    assert 1 < pair["channel_concentration"] < pair["num_channels"]
  assert not content["fixed"] and not content["channels_fixed"]


def test_top_channels_are_the_largest_in_order():
  weights = [0.1, 0.4, 0.05, 0.25, 0.12, 0.02, 0.06]
  content = _tiny_map({"s->t": 2.0}, channels=weights)
  top = content["pairs"][0]["top_channels"]
  assert [c["channel"] for c in top] == [1, 3, 4, 0, 6]
  assert [c["weight"] for c in top] == [0.4, 0.25, 0.12, 0.1, 0.06]
  assert {c["uniform"] for c in top} == {1 / 7}


@pytest.mark.parametrize(
  "weights, count",
  [
    (np.full(512, 1 / 512, np.float32), 512),
    (np.eye(7)[3], 1),
    (np.array([0.5, 0.5, 0.0, 0.0]), 2),
  ],
)
def test_effective_channels(weights, count):
  assert transfer_map.effective_channels(weights) == pytest.approx(count)


def test_fixed_matching_is_recognised():
  content = CASES["fixed"]()
  assert content["fixed"] and content["channels_fixed"]
  content = CASES["channels_only"]()
  assert content["fixed"] and not content["channels_fixed"]
  # A short run moves the weights by little, but it moves them.
  weights = np.full(512, 1 / 512, np.float32)
  weights[7] *= 1.0001
  content = _tiny_map({"s->t": 1.0}, channels=weights)
  assert not content["channels_fixed"]


def test_shares_of_several_sources():
  content = _tiny_map(
    {"b/x->t": 1.0, "a/x->t": 4.0, "b/y/z->t": 3.0},
    source_taps=["b/x", "a/x", "b/y/z"],
    sources=["b", "a"],
  )
  assert content["source_shares"] == {"b": 0.5, "a": 0.5}
  assert list(content["source_shares"]) == ["b", "a"]
  content = _tiny_map(
    {"a/x->t": 1.0, "ab/x->t": 3.0},
    source_taps=["a/x", "ab/x"],
    sources=["a", "ab"],
  )
  assert content["source_shares"] == {"a": 0.25, "ab": 0.75}
  # A source without a pair, or whose pairs went to 0, has no share.
  content = _tiny_map(
    {"a/x->t": 0.0}, source_taps=["a/x", "b/x"], sources=["a", "b"]
  )
  assert content["source_shares"] == {"a": 0.0, "b": 0.0}
  map_picture.draw(content)
  content = _tiny_map(
    {"c/a/x->t": 1.0, "c/b/x->t": 3.0},
    source_taps=["c/a/x", "c/b/x"],
    sources=["c/a", "c/b"],
  )
  assert content["source_shares"] == {"c/a": 0.25, "c/b": 0.75}
  map_picture.draw(content)
  content = CASES["three_sources"]()
  assert sum(content["source_shares"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
  "taps", [["x", "y"], ["stages_0/x", "stages_1/x"], ["a/x", "a/y"]]
)
def test_one_source_has_no_share(taps):
  content = _tiny_map({f"{taps[0]}->t": 1.0}, source_taps=taps)
  assert "source_shares" not in content


def test_the_picture_names_each_source_and_its_share():
  content = _tiny_map(
    {"b/x->t": 1.0, "a/x->t": 0.5, "b/y->t": 0.5},
    source_taps=["b/x", "a/x", "b/y"],
    sources=["b", "a"],
  )
  layers = map_picture.draw(content).axes[0]
  texts = [t.get_text() for t in layers.texts if "ch @" not in t.get_text()]
  # The taps stand below the name of their source.
  assert texts[:8] == [
    "source networks",
    *("b", "75% of the transfer", "x", "y"),
    *("a", "25% of the transfer", "x"),
  ]
  assert content["source_taps"][1]["name"] == "a/x"
  names = map_picture._pair_names(content, content["pairs"])
  assert names == ["b/x → t", "a/x → t", "b/y → t"]


def test_a_source_without_pairs_has_a_share_of_none():
  content = _tiny_map({"b/x->t": 1.0}, source_taps=["b/x"], sources=["a", "b"])
  layers, table, *_ = map_picture.draw(content).axes
  texts = [t.get_text() for t in layers.texts]
  assert texts[1:5] == ["a", "0% of the transfer", "b", "100% of the transfer"]
  assert [t.get_text() for t in table.texts] == ["1.00", "b"]


@pytest.mark.parametrize(
  "weights, text",
  [
    (np.full(32, 1 / 32), "about 32 of 32 channels matter"),
    # exp of the entropy.
    ([0.5, 0.2, 0.2, 0.1], "about 3.39 of 4 channels matter"),
    (np.eye(7)[3], "about 1 of 7 channels matter"),
  ],
)
def test_how_many_channels_matter(weights, text):
  count = transfer_map.effective_channels(np.array(weights))
  pair = {"channel_concentration": count, "num_channels": len(weights)}
  assert map_picture._channels_text(pair) == text


def test_a_written_map_can_be_read_as_weights(tmp_path):
  keys = _all(TWO, TARGET)[::-1]
  content = _map(TWO, TARGET, keys)
  map_picture.write(tmp_path, content)
  channel, pair = transfer_map.read_weights(tmp_path / "transfer_map.json")
  assert list(channel) == list(pair) == keys
  for entry in content["pairs"]:
    name = f"{entry['source']}->{entry['target']}"
    assert pair[name] == entry["pair_weight"]
    assert channel[name].shape == (entry["num_channels"],)
    np.testing.assert_array_equal(channel[name], entry["channel_weights"])
    # They are all of them, by channel; the top ones are among them.
    top = entry["top_channels"][0]
    assert channel[name].argmax() == top["channel"]
    assert channel[name].max() == top["weight"]
  # Their numbers do not fill thousands of lines.
  text = (tmp_path / "transfer_map.json").read_text("utf-8")
  assert len(text.splitlines()) < 50 * len(keys)


def _spoil(**fields):
  return lambda content: content["pairs"][0].update(fields)


def _delete(key):
  return lambda content: content["pairs"][0].pop(key)


@pytest.mark.parametrize(
  "spoil, message",
  [
    (lambda content: content.pop("pairs"), 'has no "pairs"'),
    (lambda content: content["pairs"].clear(), 'has no "pairs"'),
    (lambda content: content.update(pairs="x"), 'has no "pairs"'),
    (lambda content: content.update(pairs=["x"]), "pair 1 is not as"),
    (_delete("target"), "pair 1 is not as a run writes it .'target'."),
    (_spoil(source="r"), "a pair twice"),
    (_delete("channel_weights"), "'channel_weights'"),
    (_spoil(channel_weights=[1.0]), r"\(\) and \(1,\), not \(\) and \(2,\)"),
    (_spoil(channel_weights=[[0.5, 0.5]]), r"\(\) and \(1, 2\), not"),
    (_spoil(num_channels=3), r"\(\) and \(2,\), not \(\) and \(3,\)"),
    (_delete("num_channels"), "'num_channels'"),
    (_spoil(channel_weights=[1.5, -0.5]), "negative"),
    (_spoil(channel_weights=[float("nan"), 1.0]), "not finite"),
    (_spoil(channel_weights=["x", 1.0]), "could not convert"),
    (_spoil(channel_weights=[0.5, 0.502]), "sum to 1.002"),
    (_spoil(pair_weight=-1.0), "negative"),
    (_spoil(pair_weight=float("nan")), "not finite"),
    (_spoil(pair_weight=float("inf")), "not finite"),
    (_spoil(pair_weight=[1.0]), r"\(1,\) and \(2,\), not"),
    (_delete("pair_weight"), "'pair_weight'"),
    (_spoil(pair_weight=0.0), "all pair weights are 0"),
  ],
)
def test_a_map_that_cannot_be_reused_is_refused(spoil, message, tmp_path):
  content = _tiny_map({"s->t": 2.0, "r->t": 0.0}, source_taps=["s", "r"])
  path = tmp_path / "map.json"
  path.write_text(json.dumps(content))
  assert transfer_map.read_weights(path)[1] == {"s->t": 2.0, "r->t": 0.0}
  spoil(content)
  path.write_text(json.dumps(content))
  with pytest.raises(errors.InputError, match=message) as raised:
    transfer_map.read_weights(path)
  assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_weights_that_almost_sum_to_one_are_read(tmp_path):
  content = _tiny_map({"s->t": 2.0})
  _spoil(channel_weights=[0.5, 0.5009])(content)
  path = tmp_path / "map.json"
  path.write_text(json.dumps(content))
  np.testing.assert_array_equal(
    transfer_map.read_weights(path)[0]["s->t"], [0.5, 0.5009]
  )


@pytest.mark.parametrize(
  "raw, message",
  [
    (None, "No such file"),
    (b"{", "not JSON"),
    (b"\xff{}", "not JSON"),
    (b"[1]", 'has no "pairs"'),
  ],
)
def test_a_file_that_is_no_map_is_refused(raw, message, tmp_path):
  path = tmp_path / "map.json"
  if raw is not None:
    path.write_bytes(raw)
  with pytest.raises(errors.InputError, match=message) as raised:
    transfer_map.read_weights(path)
  assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_ignored_pairs_have_no_share():
  content = _tiny_map({"s->t": 0.0})
  assert content["pairs"][0]["share"] == 0.0
  map_picture.draw(content)


def test_the_later_record_of_an_epoch_counts():
  records = [
    {"epoch": e, "pair_weights": {"s->t": w}}
    for e, w in [(1, 1.0), (2, 9.0), (2, 1.5), (3, 2.0)]
  ]
  taps = [("s", (4, 4, 2))], [("t", (4, 4, 2))]
  weights = {"s->t": np.array([0.3, 0.7])}
  setting = transfer_map.Setting("l2t_ww", *taps)
  content = transfer_map.collect(setting, records, weights)
  assert content["epochs"] == [1, 2, 3]
  assert content["pairs"][0]["history"] == [1.0, 1.5, 2.0]


def test_records_without_numbers_are_refused():
  with pytest.raises(errors.InputError, match="No epoch"):
    _tiny_map({})
  with pytest.raises(errors.InputError, match=r"'s->t' .*not finite"):
    _tiny_map({"s->t": float("nan")})


@pytest.mark.parametrize("case", CASES)
def test_texts_neither_overlap_nor_leave_the_picture(case, monkeypatch):
  fig = map_picture.draw(CASES[case]())
  texts = pictures.draw_texts(fig, monkeypatch)
  assert len(texts) > 15
  pictures.assert_inside(fig, texts)
  # The frame around a slanted text overlaps where the text does not.
  pictures.assert_apart([text for text in texts if text[2] == 0])


@pytest.mark.parametrize("case", ["one_pair", "fixed", "sixteen"])
def test_the_picture_is_wide_enough_and_not_empty(case, tmp_path):
  map_picture.write(tmp_path, CASES[case]())
  with Image.open(tmp_path / "transfer_map.png") as image:
    assert image.format == "PNG"
    assert image.width == 1800 and 800 < image.height < 2400
    pixels = np.asarray(image.convert("RGB"))
  assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()
  assert 0.02 < (pixels < 255).any(-1).mean() < 0.5


def test_fixed_matching_says_so():
  texts = lambda case: " ".join(
    t.get_text() for t in map_picture.draw(CASES[case]()).texts
  )
  assert texts("fixed").count("fixed, not learned") == 1
  assert texts("fixed").count("Fixed at 1 for every pair, not learned") == 1
  assert "ixed" not in texts("sixteen")


@pytest.mark.parametrize(
  ("case", "scale"),
  [
    ("sixteen", "0 = ignored, 6 = maximum. The"),
    ("softplus", "0 = ignored. The"),
    ("frozen", "0 = ignored. The"),
    ("fixed", "0 = ignored. The"),
  ],
)
def test_the_picture_says_what_was_learned(case, scale):
  content = CASES[case]()
  learned = case in ("sixteen", "softplus")
  fig = map_picture.draw(content)
  texts = " ".join(t.get_text() for t in fig.texts)
  assert scale in texts
  assert ("means over each epoch" in texts) == learned
  assert ("given, not learned" in texts) != learned
  # Frozen channels are shown, if not as learned ones.
  assert ("Given, not learned. Bars" in texts) == (case == "frozen")


def test_the_picture_says_where_weights_started():
  content = CASES["sixteen"]()
  for pair in content["pairs"]:
    pair["history"][0] = pair["pair_weight"]
  pair = content["pairs"][3]
  pair["history"][0] = pair["pair_weight"] + 0.5
  course = f"{pair['pair_weight'] + 0.5:.2f} → {pair['pair_weight']:.2f}"
  texts = " ".join(t.get_text() for t in map_picture.draw(content).texts)
  (name,) = map_picture._pair_names(content, [pair])
  assert f"; moved most: {name}, {course}" in texts
  assert "of the total, as at the start." in texts
  transfer_map.strongest_first(content)[0]["history"][0] += 1
  text = map_picture.draw(content).texts[1].get_text()
  assert "of the total." in text and "as at the start" not in text


def test_weights_that_have_not_moved_are_no_result():
  content = CASES["sixteen"]()
  assert "Strongest" in map_picture.draw(content).texts[1].get_text()
  for pair in content["pairs"]:
    pair["history"] = [pair["pair_weight"] + 0.01 for _ in pair["history"]]
  text = map_picture.draw(content).texts[1].get_text()
  assert "No pair weight changed by 0.05 since the first" in text


def test_names_are_cut_but_stay_apart():
  content = {"source_taps": [{"name": name} for name, _ in LONG]}
  (own,) = map_picture._tap_names(content, "source").values()
  assert list(own) == [name for name, _ in LONG]
  short = style.shorten(list(own.values()), 14)
  assert len(set(short)) == len(LONG)
  # What all names begin with is left out first; "\\$" is one sign.
  assert all(text.startswith(r"group\$") for text in short)
  assert max(map(len, short)) <= 15
  # Only the middle differs.
  names = [f"{'a' * 40}{i}{'b' * 40}" for i in range(3)]
  assert len(set(style.shorten(names, 14))) == 3


def test_the_json_is_enough_to_redraw_the_picture(tmp_path):
  content = CASES["sixteen"]()
  before = copy.deepcopy(content)
  map_picture.write(tmp_path, content)
  assert content == before
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["transfer_map.json", "transfer_map.png"]
  text = (tmp_path / "transfer_map.json").read_text("utf-8")
  assert json.loads(text) == content
  first = (tmp_path / "transfer_map.png").read_bytes()
  map_picture.write(tmp_path, json.loads(text))
  assert (tmp_path / "transfer_map.png").read_bytes() == first


def test_content_that_is_no_json_leaves_the_old_files(tmp_path):
  old = CASES["fixed"]()
  map_picture.write(tmp_path, old)
  with pytest.raises(ValueError):
    map_picture.write(tmp_path, {**old, "epochs": [float("nan")]})
  assert json.loads((tmp_path / "transfer_map.json").read_text()) == old


def test_metrics_are_read_in_order(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"kind": "train", "step": 1}\n\n{"kind": "epoch"}\n')
  assert run_folder.read_metrics(tmp_path) == [
    {"kind": "train", "step": 1},
    {"kind": "epoch"},
  ]


@pytest.mark.parametrize("tail", ['{"kind": "tr', "17", '{"name": "\u00e4'])
def test_a_half_written_last_line_is_ignored(tmp_path, tail):
  raw = b'{"step": 1}\n' + tail.encode()[:13]
  (tmp_path / "metrics.jsonl").write_bytes(raw)
  assert run_folder.read_metrics(tmp_path) == [{"step": 1}]


def test_a_complete_last_line_without_newline_counts(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
  assert run_folder.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("bad", ['{"kind": "tr', "17", "[]"])
def test_a_damaged_line_is_named(tmp_path, bad):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{bad}\n')
  with pytest.raises(errors.InputError, match=r"metrics\.jsonl, line 2:"):
    run_folder.read_metrics(tmp_path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(errors.InputError, match=r"metrics\.jsonl does not exist"):
    run_folder.read_metrics(tmp_path)
