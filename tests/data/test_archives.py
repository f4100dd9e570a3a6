"""The folders of images that are made from official archives.

The archives here have the structure of the official ones, but few images.
"""

import io
import sys
import tarfile
import zipfile

import numpy as np
from PIL import Image
import pytest

from l2t_jax import errors
from l2t_jax.data import archives as official
from l2t_jax.data import from_folders

# Of the small archives below: (training, test) images.
COUNTS = {"tinyimagenet": (4, 2), "mit67": (4, 2), "stanford40": (4, 3)}


def jpeg(name):
  """Return an image that no other name has."""
  color = np.random.default_rng(list(name.encode())).integers(0, 256, 3)
  file = io.BytesIO()
  Image.new("RGB", (8, 6), tuple(map(int, color))).save(file, "JPEG")
  return file.getvalue()


def save_zip(path, members):
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in members.items():
      archive.writestr(name, content)


def save_tar(path, members, *, links=(), mode="w"):
  with tarfile.open(path, mode) as archive:
    for name, content in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
    for name, target in links:
      member = tarfile.TarInfo(name)
      member.type, member.linkname = tarfile.SYMTYPE, target
      archive.addfile(member)


def images(*names):
  return {name: jpeg(name) for name in names}


def tinyimagenet_members():
  root = "tiny-imagenet-200"
  annotations = (
    "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t52\t55\t57\t59\n"
  )
  return {
    f"{root}/wnids.txt": "n01\nn02\n",
    f"{root}/train/n01/n01_boxes.txt": "n01_0.JPEG\t0\t0\t62\t62\n",
    f"{root}/val/val_annotations.txt": annotations,
    **images(
      f"{root}/train/n01/images/n01_0.JPEG",
      f"{root}/train/n01/images/n01_1.JPEG",
      f"{root}/train/n02/images/n02_0.JPEG",
      f"{root}/train/n02/images/n02_1.JPEG",
      f"{root}/val/images/val_0.JPEG",
      f"{root}/val/images/val_1.JPEG",
      f"{root}/test/images/test_0.JPEG",
    ),
  }


def mit67_members():
  """The archive has more images than the two lists."""
  return images(
    "Images/mall/shopping mall.jpg",
    "Images/mall/a.jpg",
    "Images/mall/b.jpg",
    "Images/mall/unlisted.jpg",
    "Images/gym/a.jpg",
    "Images/gym/Gym1_png.jpg",
    "Images/gym/c.JPG",
  )


MIT67_TRAIN = "mall/shopping mall.jpg\ngym/a.jpg\nmall/a.jpg\ngym/c.JPG"
MIT67_TEST = "gym/Gym1_png.jpg\r\nmall/b.jpg\r\n"

# The aggregated lists disagree with the others, to show that they are not read.
STANFORD40_LISTS = {
  "ImageSplits/actions.txt": "action_name\tnumber_of_images\nrunning\t4\n",
  "ImageSplits/train.txt": "running_003.jpg\n",
  "ImageSplits/test.txt": "running_001.jpg\n",
  "ImageSplits/running_train.txt": "running_001.jpg\nrunning_002.jpg\n",
  "ImageSplits/running_test.txt": "running_003.jpg\nrunning_004.jpg\n",
  "ImageSplits/watching_TV_train.txt": "watching_TV_001.jpg\n"
  "watching_TV_003.jpg\n",
  "ImageSplits/watching_TV_test.txt": "watching_TV_002.jpg\n",
}


def stanford40_members():
  return images(
    *(f"JPEGImages/running_00{index}.jpg" for index in range(1, 5)),
    *(f"JPEGImages/watching_TV_00{index}.jpg" for index in range(1, 4)),
  )


@pytest.fixture
def archives(tmp_path):
  """A folder with the official downloads of all three data sets."""
  folder = tmp_path / "downloads"
  folder.mkdir()
  save_zip(folder / "tiny-imagenet-200.zip", tinyimagenet_members())
  save_tar(folder / "indoorCVPR_09.tar", mit67_members())
  (folder / "TrainImages.txt").write_bytes(MIT67_TRAIN.encode())
  (folder / "TestImages.txt").write_bytes(MIT67_TEST.encode())
  save_zip(folder / "Stanford40_JPEGImages.zip", stanford40_members())
  save_zip(folder / "Stanford40_ImageSplits.zip", STANFORD40_LISTS)
  return folder


def small(name):
  """Return a data set with the counts of these archives."""
  num_train, num_test = COUNTS[name]
  return official.DATA_SETS[name]._replace(
    num_train=num_train, num_test=num_test
  )


def files(folder):
  """Map the path of each file within a folder to its content."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def check_fails(name, archives, out, match):
  """Expect one line that says why, and nothing in the place of the result."""
  before = out.exists()
  with pytest.raises(errors.InputError, match=match) as error:
    official.unpack(small(name), archives, out)
  assert len(str(error.value).splitlines()) == 1
  assert out.exists() == before


EXPECTED = {
  "tinyimagenet": {
    f"{part}/{class_name}/{file}": f"tiny-imagenet-200/{member}"
    for part, class_name, file, member in (
      ("train", "n01", "n01_0.JPEG", "train/n01/images/n01_0.JPEG"),
      ("train", "n01", "n01_1.JPEG", "train/n01/images/n01_1.JPEG"),
      ("train", "n02", "n02_0.JPEG", "train/n02/images/n02_0.JPEG"),
      ("train", "n02", "n02_1.JPEG", "train/n02/images/n02_1.JPEG"),
      ("test", "n02", "val_0.JPEG", "val/images/val_0.JPEG"),
      ("test", "n01", "val_1.JPEG", "val/images/val_1.JPEG"),
    )
  },
  "mit67": {
    f"{part}/{name}": f"Images/{name}"
    for part, listed in (("train", MIT67_TRAIN), ("test", MIT67_TEST))
    for name in listed.splitlines()
  },
  "stanford40": {
    f"{part}/{action}/{file}": f"JPEGImages/{file}"
    for part, action, file in (
      ("train", "running", "running_001.jpg"),
      ("train", "running", "running_002.jpg"),
      ("test", "running", "running_003.jpg"),
      ("test", "running", "running_004.jpg"),
      ("train", "watching_TV", "watching_TV_001.jpg"),
      ("test", "watching_TV", "watching_TV_002.jpg"),
      ("train", "watching_TV", "watching_TV_003.jpg"),
    )
  },
}


@pytest.mark.parametrize("name", official.DATA_SETS)
def test_every_listed_image_is_in_its_place_unchanged(name, archives, tmp_path):
  out = tmp_path / "new" / "out"
  official.unpack(small(name), archives, out)
  assert files(out) == {
    path: jpeg(member) for path, member in EXPECTED[name].items()
  }


@pytest.mark.parametrize("name", official.DATA_SETS)
def test_folder_source_reads_the_layout(name, archives, tmp_path):
  official.unpack(small(name), archives, tmp_path / "out")
  source = from_folders.open_folder(str(tmp_path / "out"))
  assert source.num_official_val == 0
  assert len(source.class_names) == 2
  assert (len(source.train.labels), len(source.test.labels)) == COUNTS[name]
  for part in (source.train, source.test):
    for index in range(len(part.labels)):
      assert part.read_image(index).size == (8, 6)


@pytest.mark.parametrize("mode, prefix", [("w:gz", ""), ("w", "./")])
def test_other_ways_to_make_a_tar(mode, prefix, archives, tmp_path):
  members = {f"{prefix}{key}": file for key, file in mit67_members().items()}
  save_tar(archives / "indoorCVPR_09.tar", members, mode=mode)
  official.unpack(small("mit67"), archives, tmp_path / "out")
  assert files(tmp_path / "out").keys() == EXPECTED["mit67"].keys()


def test_official_counts():
  counts = {name: found[2:4] for name, found in official.DATA_SETS.items()}
  assert counts == {
    "tinyimagenet": (100_000, 10_000),
    "mit67": (5_360, 1_340),
    "stanford40": (4_000, 5_532),
  }


@pytest.mark.parametrize(
  "name, file",
  [(name, file) for name in COUNTS for file in official.DATA_SETS[name].files],
)
def test_missing_archive(name, file, archives, tmp_path):
  (archives / file).unlink()
  check_fails(name, archives, tmp_path / "out", rf"lacks {file}; download from")


@pytest.mark.parametrize(
  "name, archive, save, members, lost",
  [
    (
      "tinyimagenet",
      "tiny-imagenet-200.zip",
      save_zip,
      tinyimagenet_members(),
      "tiny-imagenet-200/val/images/val_1.JPEG",
    ),
    (
      "mit67",
      "indoorCVPR_09.tar",
      save_tar,
      mit67_members(),
      "Images/mall/shopping mall.jpg",
    ),
    (
      "stanford40",
      "Stanford40_JPEGImages.zip",
      save_zip,
      stanford40_members(),
      "JPEGImages/watching_TV_002.jpg",
    ),
  ],
)
def test_missing_image(name, archive, save, members, lost, archives, tmp_path):
  del members[lost]
  save(archives / archive, members)
  total = sum(COUNTS[name])
  match = f"{archive} lacks {lost}: it has {total - 1} of {total} listed"
  check_fails(name, archives, tmp_path / "out", match)


def test_wrong_counts(archives, tmp_path):
  (archives / "TrainImages.txt").write_text("gym/a.jpg\nmall/a.jpg\n")
  match = "found 2 training and 2 test images, expected 4 and 2; .*TrainImages"
  check_fails("mit67", archives, tmp_path / "out", match)


def test_no_validation_labels(archives, tmp_path):
  members = tinyimagenet_members()
  del members["tiny-imagenet-200/val/val_annotations.txt"]
  save_zip(archives / "tiny-imagenet-200.zip", members)
  match = r"tiny-imagenet-200\.zip is damaged \(KeyError\)"
  check_fails("tinyimagenet", archives, tmp_path / "out", match)


def test_an_image_in_both_lists_is_in_test_alone(archives, tmp_path):
  (archives / "TrainImages.txt").write_text(MIT67_TRAIN + "\nmall/b.jpg\n")
  official.unpack(small("mit67"), archives, tmp_path / "out")
  assert files(tmp_path / "out").keys() == EXPECTED["mit67"].keys()


def test_existing_out_is_kept(archives, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  (out / "mine").write_text("kept")
  check_fails("mit67", archives, out, "out' exists already; remove it or")
  assert files(out) == {"mine": b"kept"}


def test_interrupted_run_can_be_repeated(archives, tmp_path, monkeypatch):
  out = tmp_path / "out"
  read_members = official._read_members

  def stop_midway(path, wanted):
    yield next(read_members(path, wanted))
    raise KeyboardInterrupt

  monkeypatch.setattr(official, "_read_members", stop_midway)
  with pytest.raises(KeyboardInterrupt):
    official.unpack(small("mit67"), archives, out)
  assert not out.exists()
  monkeypatch.undo()
  # Of an older list: the second run must not take it over.
  leftover = tmp_path / "out.partial" / "train" / "gym" / "leftover.jpg"
  leftover.parent.mkdir(parents=True, exist_ok=True)
  leftover.write_bytes(b"")
  official.unpack(small("mit67"), archives, out)
  assert files(out).keys() == EXPECTED["mit67"].keys()
  assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
  "line",
  ["../evil.jpg", "gym/../../evil.jpg", "gym/", "/etc/evil.jpg", "gym\\a.jpg"],
)
def test_lists_can_not_lead_outside(line, archives, tmp_path):
  (archives / "TrainImages.txt").write_text(f"{MIT67_TRAIN}\n{line}\n")
  save_tar(
    archives / "indoorCVPR_09.tar", mit67_members() | {f"Images/{line}": b"x"}
  )
  check_fails(
    "mit67", archives, tmp_path / "out", "which is no plain file name"
  )
  assert not list(tmp_path.rglob("*evil*"))


def test_links_are_not_followed(archives, tmp_path):
  members = mit67_members()
  del members["Images/gym/a.jpg"]
  save_tar(
    archives / "indoorCVPR_09.tar",
    members,
    links=[("Images/gym/a.jpg", "c.JPG")],
  )
  check_fails("mit67", archives, tmp_path / "out", "lacks Images/gym/a.jpg: ")


@pytest.mark.parametrize("share", [0, 0.01, 0.4])
@pytest.mark.parametrize(
  "name, file",
  [(name, data.files[0]) for name, data in official.DATA_SETS.items()],
)
def test_damaged_archive(name, file, share, archives, tmp_path):
  content = (archives / file).read_bytes()
  (archives / file).write_bytes(content[: int(share * len(content))])
  match = rf"{file} is damaged \(\w+\); download it again"
  check_fails(name, archives, tmp_path / "out", match)


def test_list_that_is_no_text(archives, tmp_path):
  (archives / "TestImages.txt").write_bytes(b"\x1f\x8b\x08\xff")
  match = r"TestImages\.txt is damaged \(UnicodeDecodeError\)"
  check_fails("mit67", archives, tmp_path / "out", match)


def test_out_that_can_not_be_written(archives, tmp_path):
  (tmp_path / "file").write_text("")
  check_fails("mit67", archives, tmp_path / "file" / "out", "cannot read .* or")


def run(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["archives", *map(str, arguments)])
  errors.run_command(official.make_parser(), official.main)


def test_command(archives, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(official.DATA_SETS, "mit67", small("mit67"))
  run(monkeypatch, "mit67", archives, tmp_path / "out")
  wrote = f"wrote 4 training and 2 test images to {tmp_path / 'out'}\n"
  assert capsys.readouterr().out == wrote


def test_command_with_an_error(archives, tmp_path, monkeypatch, capsys):
  with pytest.raises(SystemExit, match="2"):
    run(monkeypatch, "mit67", archives, tmp_path / "out")
  assert capsys.readouterr().err.startswith(
    "error: found 4 training and 2 test images, expected 5360 and 1340;"
  )
