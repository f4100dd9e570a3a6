"""Pictures of many kinds: Pillow and a second reader see the same in them."""

import collections
import csv
import io
import json
import warnings

import numpy as np
import pytest

from l2t_jax import errors
from l2t_jax.data import image_files, look, pillow
from tests.support import data_sets, picture_zoo, small_runs


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
  """Return the folder of the pictures, the pictures, and what else is there."""
  root = tmp_path_factory.mktemp("zoo")
  pictures = picture_zoo.save(root)
  return root, pictures, picture_zoo.add_debris(root)


def _decode(picture, content):
  with warnings.catch_warnings():
    # Some images have several frames.
    warnings.simplefilter("ignore")
    return image_files.decode(content, name=picture.path.name)


def _compare(picture, image, expected):
  """Return what differs in an image from `decode`, or ""."""
  kind = picture.kind
  is_deep = isinstance(image, np.ndarray) and image.dtype == np.uint16
  if is_deep != (expected.dtype == np.uint16):
    return f"{expected.dtype} expected"
  if is_deep and kind.tolerance == 0:
    seen, wanted = map(picture_zoo.as_rgb, (image, expected))
    if not np.array_equal(seen, wanted):
      return "not the same 16 bits"
  for channels in (1, 3):
    seen = np.asarray(pillow.convert(image, channels, kind.depth))
    seen = seen.reshape(*seen.shape[:2], channels).astype(int)
    wanted = picture_zoo.as_8_bits(expected, channels, kind.depth)
    if seen.shape != wanted.shape:
      return f"shape {seen.shape} for {wanted.shape}"
    if (worst := np.abs(seen - wanted).max()) > kind.tolerance:
      return f"differs by {worst} of 255 with {channels} channels"
  return ""


def _mismatches(pictures):
  """Return what is read otherwise than by the second reader, by name."""
  found = {}
  for picture in pictures:
    expected = picture_zoo.read_second(picture)
    contents = {
      "path": picture.path,
      "content": io.BytesIO(picture.path.read_bytes()),
    }
    for how, content in contents.items():
      try:
        image = _decode(picture, content)
      except errors.InputError as error:
        if not picture.kind.may_be_refused:
          found[f"{picture.name} as {how}"] = str(error)
        continue
      except Exception as error:
        found[f"{picture.name} as {how}"] = repr(error)
        continue
      if problem := _compare(picture, image, expected):
        found[f"{picture.name} as {how}"] = problem
  return found


def _described(problems):
  return "\n".join(f"{name}: {problem}" for name, problem in problems.items())


def test_the_second_reader_sees_what_was_written(zoo):
  problems = {}
  for picture in zoo[1]:
    seen = picture_zoo.read_second(picture)
    wanted = picture.pixels
    both = [
      picture_zoo.as_8_bits(pixels, 3, picture.kind.depth).astype(int)
      for pixels in (seen, wanted)
    ]
    if both[0].shape != both[1].shape:
      problems[picture.name] = f"{both[0].shape} for {both[1].shape}"
    elif (loss := np.abs(both[0] - both[1]).mean()) > picture.kind.loss:
      problems[picture.name] = f"differs by {loss:.1f} on average"
  assert not problems, _described(problems)


def test_all_pixels_are_those_of_the_second_reader(zoo):
  problems = _mismatches(zoo[1])
  assert not problems, f"{len(problems)} mismatches\n{_described(problems)}"


def test_what_cannot_be_read_is_refused_not_misread(tmp_path):
  problems = _mismatches(picture_zoo.save_refusable(tmp_path))
  assert not problems, _described(problems)


def test_the_look_counts_all_and_finds_no_fault(zoo):
  root, pictures, passed_over = zoo
  found = look.look(data_sets.open_images("folder", path=str(root)))
  assert found["classes"] == list(picture_zoo.CLASSES)
  assert (found["unreadable"], found["equal"]) == ([], [])
  assert found["passed_over"] == passed_over
  assert found["bit_depth"] == 16
  for part, folder in picture_zoo.PARTS.items():
    here = [p for p in pictures if p.path.is_relative_to(root / folder)]
    sizes = collections.Counter(
      "{1}x{0}".format(*picture.pixels.shape) for picture in here
    )
    assert found["parts"][part]["images"] == len(here)
    assert found["parts"][part]["sizes"] == sizes


def _run_command(*arguments):
  result = small_runs.run_python(*arguments)
  assert result.returncode == 0, result.stderr
  assert "Traceback" not in result.stderr
  return result


def test_training_prediction_and_report(zoo, tmp_path):
  root, pictures, _ = zoo
  run = tmp_path / "run"
  _run_command(
    "train.py",
    "--config=configs/digits.py",
    "--config.method=scratch",
    "--config.epochs=4",
    "--config.batch_size=10",
    "--config.data.source=folder",
    "--config.data.name=",
    f"--config.data.path={root}",
    "--config.data.image_size=16",
    "--config.data.channels=3",
    "--config.data.mean=(0.5,0.5,0.5)",
    "--config.data.std=(0.25,0.25,0.25)",
    "--config.data.per_class=0",
    "--config.trackers=()",
    f"--workdir={run}",
  )
  table = _run_command("-m", "l2t_jax.predict", run, root / "Testing")
  rows = list(csv.DictReader(io.StringIO(table.stdout)))
  test = [p.path for p in pictures if p.path.is_relative_to(root / "Testing")]
  assert {row["image"] for row in rows} == {str(path) for path in test}
  assert {row["class"] for row in rows} == {*picture_zoo.CLASSES}
  right = [f"/Testing/{row['class']}/" in row["image"] for row in rows]
  summary = json.loads((run / "summary.json").read_text())
  assert summary["num_test"] == len(rows)
  assert summary["test_accuracy"] == pytest.approx(np.mean(right))
  page = tmp_path / "report.html"
  _run_command("-m", "l2t_jax.report", run, f"--output={page}")
  accuracy = f"<td>{summary['test_accuracy']:.1%}".replace("%", " %")
  assert accuracy in page.read_text()
