"""Tables and pictures of finished runs, from cells made up by hand."""

import collections
import csv
import itertools
import pathlib
import re

from matplotlib.collections import LineCollection
import numpy as np
from PIL import Image
import pytest

from l2t_jax.results import paper, table_picture, tables
from tests.support import pictures

VERSIONS = {"python": "3.11.7", "jax": "0.10.1", "numpy": "2.4.6"}
METHODS = (
  *paper.METHODS,
  "fm_all_to_all",
  "a_method_with_a_$very$_long_name",
  "l2t[bold]|w<w",
)


def _cell(method, column, test, *, num_seeds=None, errors=(), **fields):
  """Return a cell whose seeds have the test accuracies `test`, in %."""
  summaries = tuple(
    {
      "seed": seed,
      "test_accuracy": value / 100,
      "val_accuracy": (value + 1) / 100,
      "seconds": 10.0 * (seed + 1),
      "epochs": 200,
      "num_train": 50,
      "device": "1 x cpu",
      "versions": VERSIONS,
      "memory_bytes": (seed + 1) * 2**20,
      **fields,
    }
    for seed, value in enumerate(test)
  )
  asked = len(test) if num_seeds is None else num_seeds
  reported = paper.REPORTED.get(column, {}).get(method)
  return tables.Cell(method, column, summaries, asked, errors, paper=reported)


def test_seeds_that_trained_at_once_are_told_of(tmp_path):
  assert "at once" not in _write(tmp_path, [_cell("lwf", "stl10", (60.0,))])
  cell = _cell("lwf", "stl10", (60.0, 61.0), seeds_together=2)
  text = _write(tmp_path, [cell])
  assert "2 seeds trained at once: time is a seed's share" in text


def test_plain_steps_are_those_of_as_many_seeds_together():
  """Where seeds train at once, the time of an iteration is a seed's share."""

  def plain_steps(*, together):
    trial = {"fields": {}, "val_accuracy": [0.5], "seconds": 1.0, "errors": []}
    trial |= {"iterations": 100, "seeds_together": together}
    trial["iteration_seconds"] = 0.3
    alone = _cell("scratch", "a", (60.0,), iteration_seconds=0.1)
    tuned = _cell("lwf", "a", (60.0,), iteration_seconds=0.1)
    tuned = tuned._replace(tuning=tables.Tuning({}, [trial]))
    return tables.make_grid([alone, tuned]).plain_steps(tuned)

  assert plain_steps(together=1) == pytest.approx(300)
  assert plain_steps(together=2) is None


def test_validation_images_in_training_are_told_of(tmp_path):
  cells = [
    _cell("fm_all_to_all", "stl10", (60.0,), trained_on_validation=False),
    _cell("l2t_ww", "stl10", (61.0,), trained_on_validation=True),
  ]
  text = _write(tmp_path, cells)
  assert "l2t_ww: validation images took part in training" in text
  assert "fm_all_to_all: validation images" not in text
  assert "the validation accuracy is optimistic" in text
  tuned = cells[1]._replace(tuning=tables.Tuning({}, []))
  assert "which chose its values, is" in _write(tmp_path, [cells[0], tuned])


def _errors(cells):
  """Turn accuracies in % into small errors, as a user's task reports them."""
  return [
    cell._replace(
      summaries=tuple(
        {
          **summary,
          "test_accuracy": summary["test_accuracy"] * -0.1234,
          "val_accuracy": summary["val_accuracy"] * -0.1234,
        }
        for summary in cell.summaries
      ),
      in_percent=False,
    )
    for cell in cells
  ]


def _grid(num_methods, columns, *, num_seeds=3):
  """Return made-up results; with three methods or more, some are missing."""
  rng = np.random.default_rng(0)
  cells = []
  for j, column in enumerate(columns):
    for i, method in enumerate(METHODS[:num_methods]):
      value = paper.REPORTED.get(column, {}).get(method, 60.0 + i) - 2 + j
      test = value + rng.normal(size=num_seeds)
      if num_methods > 2 and i == 1 and j == 0:
        test = test[1:]
      if num_methods > 2 and i == 2 and j == len(columns) - 1:
        test = ()
      cells.append(_cell(method, column, test, num_seeds=num_seeds))
  return cells


def _legend(ax):
  return [text.get_text() for text in ax.get_legend().get_texts()]


def _values(values, name="per_class"):
  return [f"{name}={value}" for value in values]


PAPERS = list(paper.REPORTED)
CASES = {
  f"{m}_methods_{n}_columns": (m, PAPERS[:n])
  for m, n in itertools.product((1, 3, 12), (1, 2, 6))
}
CASES |= {
  f"{m}_methods_{len(v)}_values": (m, _values(v))
  for m, v in itertools.product(
    (1, 3, 12), ((5, 10), (5, 10, 20, 50, 100, 500))
  )
}
CASES |= {
  "no_paper": (3, ["a_$config$_with_a_" + 9 * "too_" + "long_name", "digits"]),
  "close_values": (2, _values((1e-05, 2e-05, 0.5, 0.5001, 100), "x" * 80)),
  "negative_values": (2, _values((-1, 0, 3))),
}


def _write(tmp_path, cells):
  table_picture.write(tmp_path, cells)
  return (tmp_path / "table.md").read_text("utf-8")


def _csv(tmp_path, cells):
  table_picture.write(tmp_path, cells)
  with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
    return list(csv.reader(file))


def test_csv_by_hand(tmp_path):
  # Of 70, 72, 77: mean 73, deviations -3, -1, 4, variance 26 / 2.
  rows = _csv(
    tmp_path,
    [
      _cell("l2t_ww", "stl10", (70, 72, 77)),
      _cell("mine", "stl10", (50,), num_seeds=2, memory_bytes=None),
      _cell("l2t_ww", "digits", ()),
    ],
  )
  std = "3.6056"  # sqrt(13)
  assert all(row[10:] == [""] * 9 for row in rows[1:])  # Nothing is compared.
  assert [row[:10] for row in rows] == [
    [
      *("method", "column", "seeds", "test_mean", "test_std", "val_mean"),
      *("val_std", "paper", "seconds", "memory_mib"),
    ],
    ["l2t_ww", "stl10", "3", "73.0", std, "74.0", std, "78.3", "20.0", "3.0"],
    ["l2t_ww", "digits", "0", *[""] * 7],
    ["mine", "stl10", "1", "50.0", "", "51.0", "", "", "10.0", ""],
    ["mine", "digits", "0", *[""] * 7],
  ]


def test_std_is_that_of_a_sample(tmp_path):
  text = _write(tmp_path, [_cell("lwf", "stl10", (60, 64))])
  assert "| 62.0 ± 2.8 |" in text  # 2 sqrt(2); over n it would be 2.0.
  assert "sample standard deviation" in text
  text = _write(tmp_path, [_cell("lwf", "stl10", (60,))])
  assert "| 60.0 |" in text and "±" not in text


def test_markdown_of_one_column(tmp_path):
  text = _write(
    tmp_path,
    [
      _cell("lwf", "stl10", (60, 64)),
      _cell("l2t_ww", "stl10", (70,), memory_bytes=3 * 2**29),
    ],
  )
  assert text.splitlines() == [
    "**stl10: accuracy at the best validation epoch**",
    "",
    "| method | test % | paper % | validation % | seeds | seconds | memory |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    "| `lwf` | 62.0 ± 2.8 | 68.6 | 63.0 ± 2.8 | 2 | 15 | 2 MiB |",
    "| `l2t_ww` | 70.0 | 78.3 | 71.0 | 1 | 10 | 1.5 GiB |",
    "",
    "- ±: sample standard deviation over the seeds.",
    "- paper %: reported by the paper, not measured here.",
    "- Memory: what the compiled training step needs.",
    "- Epochs: 200. Device: 1 x cpu; python 3.11.7, jax 0.10.1, numpy 2.4.6.",
  ]
  # Without a number of the paper, no column for it.
  assert "paper" not in _write(tmp_path, [_cell("lwf", "digits", (60, 64))])


def test_markdown_of_several_columns(tmp_path):
  text = _write(
    tmp_path,
    [
      _cell("lwf", "stl10", (60, 64), num_seeds=3),
      _cell("lwf", "digits", (80,), memory_bytes=None),
      _cell("l2t_ww", "stl10", (), num_seeds=3),
      _cell("l2t_ww", "digits", (90,)),
    ],
  )
  assert text.splitlines()[:13] == [
    "**Test accuracy in % at the best validation epoch**",
    "",
    "| method | stl10 | digits |",
    "| --- | --- | --- |",
    "| `lwf` | 62.0 ± 2.8 [68.6], 2 of 3 seeds | 80.0 |",
    "| `l2t_ww` | – [78.3] | 90.0 |",
    "",
    "**Time per run and memory**",
    "",
    "| method | stl10 | digits |",
    "| --- | --- | --- |",
    "| `lwf` | 15 s, 2 MiB | 10 s |",
    "| `l2t_ww` | – | 10 s, 1 MiB |",
  ]
  assert "- [ ]: reported by the paper" in text


def test_the_papers_numbers_are_left_out_of_another_setting(tmp_path):
  told = "epochs is 5, not 200"
  other = _cell("lwf", "stl10", (60,))._replace(departures=(told,))
  cells = [_cell("at", "stl10", (60,)), other]
  text = _write(tmp_path, cells)
  # Of all of the column.
  assert "| method | test % | validation % | seeds |" in text
  assert "74.2" not in text and "68.6" not in text
  assert f"\n- the paper's numbers are left out: {told}.\n" in text
  assert [row[7] for row in _csv(tmp_path, cells)[1:]] == ["", ""]
  fig = table_picture.draw(cells)
  assert "reported by the paper" not in [t.get_text() for t in fig.texts]
  # And of no other column.
  text = _write(tmp_path, [*cells, _cell("at", "dogs", (60,))])
  assert "| `at` | 60.0 | 60.0 [69.7] |" in text
  assert f"\n- stl10: the paper's numbers are left out: {told}.\n" in text
  # A line is not filled with hundreds.
  many = other._replace(departures=tuple(map(str, range(999))))
  text = _write(tmp_path, [many])
  assert re.search(r"left out: 0; 1; 2; 3; .{200,300}; \.\.\.\.\n", text)


def test_accuracies_that_are_no_shares(tmp_path):
  """A mean absolute error of 4.2 is not -420 %."""
  cell = _cell("lwf", "age", (-418, -422))._replace(in_percent=False)
  text = _write(tmp_path, [cell])
  assert text.splitlines()[:5] == [
    "**age: accuracy at the best validation epoch**",
    "",
    "| method | test | validation | seeds | seconds | memory |",
    "| --- | ---: | ---: | ---: | ---: | ---: |",
    "| `lwf` | -4.2 ± 0.028 | -4.19 ± 0.028 | 2 | 15 | 2 MiB |",
  ]
  row = ["lwf", "age", "2", "-4.2", "0.028284", "-4.19", "0.028284", ""]
  assert _csv(tmp_path, [cell])[1][:8] == row
  (ax,) = table_picture.draw([cell]).axes
  assert ax.get_xlabel() == "test accuracy"
  low, high = ax.get_xlim()
  assert -4.3 < low < -4.23 and -4.17 < high < -4.1
  # Beside a classifier each column says what it is.
  text = _write(tmp_path, [cell, _cell("lwf", "stl10", (60,))])
  assert text.splitlines()[:5] == [
    "**Test accuracy at the best validation epoch**",
    "",
    "| method | age | stl10 % |",
    "| --- | --- | --- |",
    "| `lwf` | -4.2 ± 0.028 | 60.0 [68.6] |",
  ]
  # And over the values of a field.
  sweep = [cell._replace(column=f"n={n}") for n in (5, 10)]
  (ax,) = table_picture.draw(sweep).axes
  assert ax.get_ylabel() == "test accuracy"
  assert _legend(ax) == ["-4.2  lwf"]


def test_what_is_missing_or_failed_is_said(tmp_path):
  failed = _cell(
    "lwf", "stl10", (60, 64), num_seeds=3, errors=("seed 2: loss\nis <nan>",)
  )
  never = _cell("at", "stl10", (), num_seeds=3)
  text = _write(tmp_path, [failed, never])
  assert "| 2 of 3 |" in text and "| 0 of 3 |" in text
  assert "| `at` | – | 74.2 | – | 0 of 3 | – | – |" in text
  assert "\n- lwf, seed 2: loss is &lt;nan>\n- at: 0 of 3 seeds\n" in text
  # The failed seed is accounted for.
  assert "lwf: 2 of 3" not in text
  # With several columns, each line says which.
  text = _write(tmp_path, [failed, never, _cell("at", "digits", (50, 60))])
  assert "\n- lwf, stl10, seed 2: loss is &lt;nan>\n" in text
  assert "\n- lwf, digits: not run\n- at, stl10: 0 of 3 seeds\n" in text
  assert "at, digits:" not in text


def test_hardware_and_versions_that_differ_are_all_said(tmp_path):
  new = {**VERSIONS, "jax": "0.10.3", "optax": "0.2.8"}
  text = _write(
    tmp_path,
    [
      _cell("lwf", "stl10", (60, 64), epochs=3),
      _cell("at", "stl10", (60,), device="8 x TPU v5", versions=new),
    ],
  )
  assert "Epochs: 3 or 200. Device: 1 x cpu or 8 x TPU v5; " in text
  assert "jax 0.10.1 or 0.10.3, numpy 2.4.6, optax ? or 0.2.8." in text


def test_a_summary_without_memory_is_read(tmp_path):
  cell = _cell("lwf", "stl10", (60, 64))
  for summary in cell.summaries:
    del summary["memory_bytes"]
  text = _write(tmp_path, [cell])
  assert "| 15 | – |" in text and "Memory:" not in text


def test_names_cannot_break_the_markdown(tmp_path):
  text = _write(tmp_path, [_cell("a|b<c", "x|<y", (60,))])
  assert r"| `a\|b<c` | 60.0 |" in text
  assert r"**x\|&lt;y: accuracy" in text


def test_files_are_replaced_as_a_whole(tmp_path, monkeypatch):
  folder = tmp_path / "new" / "folder"
  table_picture.write(folder, [_cell("lwf", "stl10", (10,))])
  names = ["table.csv", "table.md", "table.png"]
  assert sorted(path.name for path in folder.iterdir()) == names
  table_picture.write(folder, [_cell("lwf", "stl10", (20,))])
  assert "| 20.0 |" in (folder / "table.md").read_text("utf-8")
  assert sorted(path.name for path in folder.iterdir()) == names

  # Stopped while writing: the old content stands, nothing is left behind.
  used = []
  write_bytes = pathlib.Path.write_bytes

  def fail(self, content):
    used.append(self.name)
    write_bytes(self, content[:10])
    raise OSError("no space left")

  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
  for _ in range(2):
    with pytest.raises(OSError):
      table_picture.write(folder, [_cell("lwf", "stl10", (30,))])
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
  # Two processes that write at once use two files.
  assert len(set(used)) == 2


def test_the_printed_table_says_the_same(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  cells = [
    _cell(
      "l2t[bold]_ww", "stl10", (60, 64), num_seeds=3, errors=("seed 2: [x]",)
    ),
    _cell("l2t_w_one_to_one", "stl10", (70, 71)),
  ]
  tables.print_table(cells)
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 80
  words = [line.split() for line in lines]
  row = "l2t[bold]_ww 62.0 ± 2.8 – 63.0 ± 2.8 2 of 3 15 2 MiB"
  assert row.split() in words
  row = "l2t_w_one_to_one 70.5 ± 0.7 76.4 71.5 ± 0.7 2 15 2 MiB"
  assert row.split() in words
  assert "l2t[bold]_ww, seed 2: [x]" in lines
  assert any("sample standard deviation" in line for line in lines)


def test_a_narrow_terminal_folds_a_wide_table(capsys, monkeypatch):
  cells = _grid(3, PAPERS)
  printed = []
  for width in (60, 80, 200):
    monkeypatch.setenv("COLUMNS", str(width))
    tables.print_table(cells)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    printed.append(collections.Counter("".join(out.split()).replace("─", "")))
  # No character of a cell is cut.
  assert printed[0] == printed[1] == printed[2]
  # Each column once for accuracy and once for time.
  heads = [line.split() for line in lines if "method" in line]
  assert heads == [["method", *PAPERS]] * 2
  # "2 of 3 seeds" stands behind its value.
  assert sum("], 2 of 3 seeds" in line for line in lines) == 1


@pytest.mark.parametrize(
  "columns, expected",
  [
    (["a=10", "a=5"], ("a", {5.0: "a=5", 10.0: "a=10"})),
    (["a=1e-3", "a=-1"], ("a", {-1.0: "a=-1", 0.001: "a=1e-3"})),
    (["a=5"], None),
    (["a=5", "b=10"], None),
    (["a=5", "a=5.0", "a=6"], None),
    (["a=5", "a=all"], None),
    (["a=5", "a=inf"], None),
    (["a=0", "a=5"], ("a", {0.0: "a=0", 5.0: "a=5"})),
    (["per_class=0", "per_class=5"], None),  # 0 stands for all.
    (["5", "10"], None),
    (["stl10", "dogs"], None),
  ],
)
def test_a_sweep_is_recognised(columns, expected):
  assert table_picture._sweep(columns) == expected


def test_a_wide_range_of_values_is_drawn_on_a_log_axis():
  scale = lambda values: (
    table_picture.draw(_grid(1, _values(values, "a"))).axes[0].get_xscale()
  )
  assert scale((5, 10, 50)) == "linear"
  assert scale((5, 10, 51)) == "log"
  assert scale((0, 10, 510)) == "linear"


def test_the_panel_shows_means_whiskers_seeds_and_the_paper():
  cells = [
    _cell("l2t_ww", "stl10", (70, 72, 77)),
    _cell("mine", "stl10", (69,)),
    _cell("other", "stl10", ()),
  ]
  fig = table_picture.draw(cells)
  (ax,) = fig.axes
  drawn = {
    (tuple(np.round(line.get_xdata(), 2)), line.get_marker())
    for line in ax.get_lines()
  }
  std = np.sqrt(13)
  assert drawn == {
    ((78.3,), "D"),
    (tuple(np.round([73 - std, 73 + std], 2)), "None"),
    ((73.0,), "o"),
    ((70.0, 72.0, 77.0), "o"),
    ((69.0, 69.0), "None"),
    ((69.0,), "o"),
  }
  low, high = ax.get_xlim()
  assert low < 69 and high > 78.3
  texts = [t.get_text() for t in ax.texts]
  assert texts == ["73.0 ± 3.6", "69.0", "–"]
  assert ax.get_ylim()[0] > ax.get_ylim()[1]  # The first method on top.
  legend = lambda figure: (
    "reported by the paper" in [t.get_text() for t in figure.texts]
  )
  assert legend(fig)
  assert not legend(table_picture.draw(cells[1:]))


def test_the_panel_says_of_how_many_seeds_a_difference_is():
  cells = [
    _cell("scratch", "stl10", (60,), num_seeds=3),
    _cell("l2t_ww", "stl10", (70, 72, 77)),
  ]
  (ax,) = table_picture.draw(cells, "scratch").axes
  assert [t.get_text() for t in ax.texts] == ["+10.0", "1 of 3 seeds"]


def _intervals(cells):
  """Return the ends of the vertical lines of a sweep's picture."""
  (ax,) = table_picture.draw(cells).axes
  return [
    sorted(segment[:, 1])
    for drawn in ax.collections
    if isinstance(drawn, LineCollection)
    for segment in drawn.get_segments()
  ]


def test_the_sweep_shows_a_line_for_each_method():
  cells = [
    _cell("late", "n=10", (60, 64)),
    _cell("late", "n=5", (50, 54)),
    _cell("early", "n=5", (40,)),
    _cell("never", "n=5", ()),
  ]
  (ax,) = table_picture.draw(cells).axes
  late, early, never = ax.get_lines()
  # By value, not in the order given.
  np.testing.assert_array_equal(late.get_xdata(), [5, 10])
  np.testing.assert_allclose(late.get_ydata(), [52, 62])
  np.testing.assert_array_equal(early.get_xdata(), [5])
  assert len(never.get_xdata()) == 0
  alone = [_cell("one", "n=5", (50, 54)), _cell("one", "n=10", ())]
  (ends,) = _intervals(alone)
  assert ends == pytest.approx([52 - 2 * np.sqrt(2), 52 + 2 * np.sqrt(2)])
  edge = ax.collections[0].get_paths()[0].vertices
  assert edge[:, 1].max() == pytest.approx(62 + 2 * np.sqrt(2))
  # From the highest end to the lowest.
  assert _legend(ax) == ["62.0  late", "early (to 5)", "–  never"]


@pytest.mark.parametrize("reference", ["", METHODS[0]])
@pytest.mark.parametrize("change", [list, _errors])
@pytest.mark.parametrize("case", CASES)
def test_texts_neither_overlap_nor_leave_the_picture(
  case, change, reference, monkeypatch
):
  num_methods, columns = CASES[case]
  if reference and num_methods == 1:
    pytest.skip("nothing is compared")
  fig = table_picture.draw(change(_grid(num_methods, columns)), reference)
  texts = pictures.draw_texts(fig, monkeypatch)
  assert len(texts) > 4 + num_methods
  pictures.assert_inside(fig, texts)
  pictures.assert_apart(texts)


@pytest.mark.parametrize("columns", [["stl10"], PAPERS, _values((5, 50))])
def test_the_picture_is_wide_enough_and_not_empty(columns, tmp_path):
  table_picture.write(tmp_path, _grid(3, columns))
  with Image.open(tmp_path / "table.png") as image:
    assert image.format == "PNG"
    assert image.width == 1800 and 400 < image.height < 2400
    pixels = np.asarray(image.convert("RGB"))
  assert (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()
  assert 0.01 < (pixels < 255).any(-1).mean() < 0.5


@pytest.mark.parametrize("columns", [["digits", "mine"], _values((1, 2))])
def test_without_a_result_there_still_is_a_picture(columns):
  fig = table_picture.draw([_cell("lwf", c, (), num_seeds=2) for c in columns])
  assert "No run has finished." in [t.get_text() for t in fig.texts]
  fig = table_picture.draw([_cell("lwf", c, (50,)) for c in columns])
  assert "One seed each." in [t.get_text() for t in fig.texts]
