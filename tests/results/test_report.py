"""The page of runs: its content, and the page itself in a real browser."""

import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2t_jax import cli, errors, report
from l2t_jax.method import saliency
from l2t_jax.results import plotly_figures, run_warnings, tables
from l2t_jax.run import saliency_images
from tests.support import small_runs

pytestmark = pytest.mark.xdist_group("experiment")
CHROMIUM = shutil.which("chromium"), shutil.which("chromedriver")


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
  """A real run, and two others that are made of its files."""
  folder = tmp_path_factory.mktemp("runs")
  for name in ("l2t_ww/seed0", "l2t_ww/seed1", "scratch/seed0"):
    shutil.copytree(
      finished, folder / name, ignore=shutil.ignore_patterns("tensorboard")
    )
  edit(folder / "l2t_ww/seed1/config.json", lambda c: c.update(seed=1))
  edit(
    folder / "l2t_ww/seed1/transfer_map.json",
    lambda content: [
      pair.update(pair_weight=weight, history=[1.0, 1.0, weight])
      for pair, weight in zip(content["pairs"], (0.01, 5.95), strict=True)
    ],
  )
  scratch = folder / "scratch/seed0"
  edit(scratch / "config.json", lambda c: c.update(method="scratch"))
  edit(scratch / "summary.json", lambda s: s.update(val_accuracy=0.99))
  (scratch / "transfer_map.json").unlink()
  return folder


@pytest.fixture(scope="module")
def page(folder):
  path = folder / "page" / "report.html"
  result = small_runs.run_python(
    "-m", "l2t_jax.report", folder, f"--output={path}", "--images=3"
  )
  assert result.returncode == 0, result.stderr
  return path


def test_curves_of_other_data_have_another_colour(folder):
  runs = report.find_runs([folder])
  names = lambda: [
    (line.name, line.line.color)
    for line in plotly_figures.draw_curves(runs, "val_loss", "loss").data
  ]
  learned, same, scratch = names()
  assert learned == same and scratch[0] == "scratch"
  runs[1].config["data"] |= {"name": "", "path": "data/birds"}
  learned, other, scratch = names()
  assert other[0] == "l2t_ww, birds" and other[1] != learned[1]


def test_accuracies_have_the_unit_of_their_task(folder):
  runs = report.find_runs([folder])
  runs[1].config["target"]["task"] = "package.module:TASK"
  lines = plotly_figures.draw_curves(runs, "val_accuracy", "accuracy").data
  for run, line, factor in zip(runs, lines, (100, 1, 100), strict=True):
    assert line.y == tuple(factor * one["val_accuracy"] for one in run.epochs)


def test_results_and_means_over_seeds(folder):
  runs = report.find_runs([folder])
  assert [r.name for r in runs] == [
    "l2t_ww/seed0",
    "l2t_ww/seed1",
    "scratch/seed0",
  ]
  *rows, mean, _ = tables.run_rows(runs)
  summary = runs[0].summary
  assert rows[0]["test"] == f"{100 * summary['test_accuracy']:.1f} %"
  assert rows[0]["best epoch"] == str(summary["best_epoch"])
  assert rows[0]["epochs"] == "3 of 3"
  assert mean["run"] == "l2t_ww: mean ± std"
  assert mean["seed"] == "2 seeds"
  assert mean["test"] == f"{100 * summary['test_accuracy']:.1f} ± 0.0 %"
  runs[1].config["seed"] = 0  # A copied folder is no second seed.
  assert [row["seed"] for row in tables.run_rows(runs)] == ["0", "0", "0"]


def test_groups_are_compared_with_a_reference(folder, tmp_path):
  runs = report.find_runs([folder])
  runs[0].summary["test_accuracy"] = 0.75
  runs[1].summary.update(seed=1, test_accuracy=0.25)
  runs[2].summary["test_accuracy"] = 0.5
  rows = tables.run_rows(runs, "scratch")
  *single, mean, scratch = [row["minus scratch"] for row in rows]
  assert mean == "+25.0"  # Of seed 0, which alone both have.
  assert [*single, scratch] == ["", "", ""]
  page = report.make_page(runs, 0, "scratch")
  assert "<th>minus scratch</th>" in page
  assert "<td>+25.0</td>" in page
  # Of several configs of a method, that of the same column is compared.
  copied = runs[2]._replace(
    experiment="another",
    config=runs[2].config | {"epochs": 9},
    summary=runs[2].summary | {"test_accuracy": 0.4},
  )
  *_, mean, _, _ = tables.run_rows([*runs, copied], "scratch")
  assert mean["minus scratch"] == "+25.0"
  # That of another column is none, whether or not its own is there.
  *_, mean, _ = tables.run_rows([*runs[:2], copied], "scratch")
  assert mean["minus scratch"] == ""
  # What was tuned for one of them may differ.
  tuned = copied._replace(tuned=frozenset(["epochs"]))
  *_, mean, _ = tables.run_rows([*runs[:2], tuned], "scratch")
  assert mean["minus scratch"] == "+35.0"
  # Other images are not comparable.
  runs[2].summary["split_hash"] = "another"
  assert not any(
    row["minus scratch"] for row in tables.run_rows(runs, "scratch")
  )
  # A table's trials are none of its results.
  trial = tmp_path / "kd" / "tuning_trials" / "beta=1" / "seed10000"
  shutil.copytree(folder / "scratch" / "seed0", trial)
  shutil.copytree(folder / "scratch" / "seed0", tmp_path / "kd" / "seed0")
  (run,) = report.find_runs([tmp_path])
  assert run.workdir == (tmp_path / "kd" / "seed0").resolve()
  (run,) = report.find_runs([tmp_path / "kd" / "tuning_trials"])
  assert run.workdir == trial.resolve()


def test_the_reference_of_a_column_may_be_unfinished(folder):
  """The runs of another column do not take its place."""
  runs = report.find_runs([folder])
  for run in runs:
    run.summary["test_accuracy"] = 0.5
  other, *_ = runs
  weight = {"transfer": other.config["transfer"] | {"beta": 9.0}}
  reference = other._replace(
    experiment="another", config=other.config | weight, summary=None
  )
  compared = runs[2]._replace(
    experiment="compared",
    config=runs[2].config | weight | {"method": "fm_single"},
  )
  minus = lambda *others: tables.run_rows([other, *others], "l2t_ww")[-1]
  assert minus(reference, compared)["minus l2t_ww"] == ""
  finished = reference._replace(summary=other.summary)
  assert minus(finished, compared)["minus l2t_ww"] == "+0.0"
  # A method without a source does not know the content of its file.
  assert "source.weights" in finished.contents
  assert (
    minus(finished, compared._replace(contents={}))["minus l2t_ww"] == "+0.0"
  )


def test_files_are_told_apart_by_content(folder, tmp_path):
  """Two tables with the same paths may be about different images."""
  for name in ("one", "two"):
    shutil.copytree(folder / "l2t_ww/seed0", tmp_path / name / "seed0")
  contents = {"source.weights": "other weights"}
  file = tmp_path / "two" / "seed0" / "contents.json"
  one, two = report.find_runs([tmp_path])
  assert one.experiment == two.experiment
  file.write_text(json.dumps(json.loads(file.read_text()) | contents))
  one, two = report.find_runs([tmp_path])
  assert one.experiment != two.experiment


def test_what_a_table_has_tuned_is_known(folder, tmp_path):
  shutil.copytree(folder / "l2t_ww/seed0", tmp_path / "l2t_ww/seed0")
  chosen = {"chosen": {"transfer.beta": "2"}, "trials": []}
  (tmp_path / "l2t_ww" / "tuning.json").write_text(json.dumps(chosen))
  (run,) = report.find_runs([tmp_path])
  assert run.tuned == {"transfer.beta"}


def test_the_recipe_of_a_run(folder):
  run, *_ = report.find_runs([folder])
  run.config["data"]["mixup"] = 0.8
  run.config["optimizer"]["name"] = "adamw"
  page = report.make_page([run], 0)
  for text in ("data.mixup=0.8", "optimizer.name=adamw"):
    assert f"<code>{text}</code>" in page
  assert "<code>optimizer.momentum" not in page


def test_warnings(folder, tmp_path):
  found = run_warnings.find_warnings(report.find_runs([folder]))
  assert len(found) == 3
  assert found[0].startswith("negative transfer: l2t_ww minus scratch/seed0")
  assert found[0].endswith("in validation accuracy (one seed)")
  assert "seed1: 1 of 2 pairs are dead" in found[1]
  assert "seed1: 1 of 2 pair weights are at relu6's ceiling" in found[2]
  runs = report.find_runs([folder])
  for run in runs:
    is_l2t_ww = run.config["method"] == "l2t_ww"
    run.summary["trained_on_validation"] = is_l2t_ww
    run.summary["test_accuracy"] = 0.1 if is_l2t_ww else 0.2
  expected = "l2t_ww/seed0, l2t_ww/seed1: validation images took part"
  texts = run_warnings.find_warnings(runs)
  assert len(texts) == 4
  assert any(text.startswith(expected) for text in texts)
  # Their validation accuracy is optimistic, so the test accuracy decides.
  assert texts[0].endswith("is -10.0 in test accuracy (one seed)")
  for run in runs:
    run.summary["test_accuracy"] = None
  assert "negative" not in "".join(run_warnings.find_warnings(runs))
  shutil.copytree(folder / "l2t_ww/seed0", tmp_path / "cut_off")
  for name in ("summary.json", "transfer_map.json"):
    (tmp_path / "cut_off" / name).unlink()
  lines = (tmp_path / "cut_off/metrics.jsonl").read_text().splitlines()
  one = next(i for i, line in enumerate(lines) if '"kind": "epoch"' in line)
  (tmp_path / "cut_off/metrics.jsonl").write_text("\n".join(lines[: one + 1]))
  (run,) = report.find_runs([tmp_path / "cut_off"])
  assert run_warnings.find_warnings([run]) == [
    "cut_off: not finished, 1 of 3 epochs"
  ]
  assert "drawn when the run is finished" in report.make_page([run], 0)


@pytest.mark.parametrize(
  ("transfer", "warns"),
  [((0.5, 0.7, 0.8), False), ((0.71, 0.66, 0.78), True)],
)
def test_negative_transfer_is_more_than_the_noise_of_seeds(
  folder, transfer, warns
):
  """Of the mean of the first, 2 points below scratch, seeds disagree."""
  run, _, plain = report.find_runs([folder])

  def seeds(run, accuracies):
    return [
      run._replace(
        config=run.config | {"seed": seed},
        summary=run.summary | {"val_accuracy": accuracy},
      )
      for seed, accuracy in enumerate(accuracies)
    ]

  runs = seeds(run, transfer) + seeds(plain, (0.74, 0.7, 0.8))
  found = [
    text
    for text in run_warnings.find_warnings(runs)
    if text.startswith("negative transfer")
  ]
  assert len(found) == warns
  if warns:
    assert "is -3.0 [" in found[0]


def test_folders_without_runs_and_damaged_ones(folder, tmp_path):
  with pytest.raises(
    errors.InputError, match=r"no run in .*of a run; name the"
  ):
    report.find_runs([tmp_path])
  shutil.copytree(folder / "scratch/seed0", tmp_path / "damaged")
  (tmp_path / "damaged/summary.json").write_text('{"method"')
  with pytest.raises(errors.InputError, match=r"summary\.json is damaged"):
    report.find_runs([tmp_path])


def test_a_run_can_be_repeated_from_its_config(folder):
  path = folder / "l2t_ww/seed0/config.json"
  config = cli.load_config(str(path), ["--config.log_every=7"])
  assert config.log_every == 7
  config.log_every = 20
  assert json.loads(config.to_json()) == json.loads(path.read_text())
  result = small_runs.run_python(
    "train.py", f"--config={path}", f"--workdir={path.parent}"
  )
  assert "complete run; nothing to do" in result.stdout


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[1]", "is not the config of a run"),
    ('{"epochs": "many"}', "is not the config of a run.*epochs"),
    ('{"epoch": 1}', "unknown field config.epoch"),
  ],
)
def test_configs_of_runs_that_are_none(text, message, tmp_path):
  path = tmp_path / "config.json"
  path.write_text(text)
  with pytest.raises(errors.InputError, match=message):
    cli.load_config(str(path))


def test_saliency_by_hand(x64):
  images = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
  kernel = jnp.array([[1.0, 2.0, 0.0], [0.0, -3.0, 1.0]])
  weights = jnp.array([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
  seen = saliency.saliency(lambda x: x @ kernel, images, weights)
  energy = 2 / 12 * (images @ kernel) * weights[:, None, None]
  wanted = np.abs(np.einsum("bhwc,ic->bhwi", energy, kernel)).max(axis=-1)
  np.testing.assert_allclose(seen, wanted, rtol=1e-12)


def test_saliency_of_a_run(folder):
  runs = report.find_runs([folder / "l2t_ww"])
  seen = saliency_images.compute_saliency(runs[0], 3)
  assert len(seen.images) == 3
  assert len(set(seen.images)) == 3
  assert [len(pair.learned) for pair in seen.pairs] == [3, 3]
  # Weights of a few steps differ little from uniform ones, and do differ.
  assert seen.pairs[0].uniform != seen.pairs[0].learned


def test_what_saliency_needs_may_be_gone(folder, tmp_path):
  shutil.copytree(folder / "l2t_ww/seed0", tmp_path / "run")
  edit(
    tmp_path / "run/config.json",
    lambda config: config["source"].update(weights="gone.safetensors"),
  )
  content = report.make_page(report.find_runs([tmp_path]), 2)
  assert "No saliency: no source weights at gone.safetensors" in content


def test_a_run_that_cannot_be_read_ends_no_report(folder, monkeypatch):
  def fail(*_):
    raise errors.StorageError("cannot read the checkpoint")

  monkeypatch.setattr(saliency_images, "compute_saliency", fail)
  content = report.make_page(report.find_runs([folder]), 2)
  assert "No saliency: cannot read the checkpoint" in content


def test_names_are_text_and_no_markup(folder, tmp_path):
  name = "<b onload=alert(1)>"
  shutil.copytree(folder / "l2t_ww/seed0", tmp_path / name)
  shutil.copytree(folder / "l2t_ww/seed1", tmp_path / "other")
  content = report.make_page(report.find_runs([tmp_path]), 0)
  assert name not in content


@pytest.fixture(scope="module")
def browser():
  if not all(CHROMIUM):
    pytest.skip("needs chromium and chromium-driver")
  webdriver = pytest.importorskip("selenium.webdriver")
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM[0]
  for argument in (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
  ):
    options.add_argument(argument)
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(
    options=options, service=webdriver.ChromeService(CHROMIUM[1])
  )
  yield driver
  driver.quit()


def show(browser, page, width=1200, scheme="light"):
  browser.execute_cdp_cmd(
    "Emulation.setEmulatedMedia",
    {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
  )
  browser.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride",
    {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
  )
  browser.get(page.as_uri())
  wait_for(browser, "return document.querySelectorAll('.main-svg').length > 0")


def wait_for(browser, condition):
  """Wait until a script is true; return what it returns."""
  until = time.time() + 20
  while time.time() < until:
    if value := browser.execute_script(condition):
      return value
    time.sleep(0.1)
  pytest.fail(f"never true: {condition}")


def test_the_page_in_a_browser(browser, page):
  show(browser, page)
  wait_for(
    browser,
    "return [...document.querySelectorAll('.plot')].filter("
    "x => x.offsetWidth).every(x => x.querySelector('.main-svg'))",
  )
  text = browser.find_element("tag name", "body").text
  assert "negative transfer" in text
  assert "mean ± std" in text
  assert "stage3_block1 → conv3, learned" in text
  loaded = "return [...document.images].every(x => x.naturalWidth > 0)"
  assert browser.execute_script(loaded)
  assert len(browser.find_elements("css selector", ".saliency img")) == 3 * 5
  assert browser.get_log("browser") == []


def test_hover_and_slider_and_choice(browser, page):
  from selenium.webdriver.common.action_chains import ActionChains

  show(browser, page)
  place = browser.find_element("css selector", "[id^=map-]")
  script = "arguments[0].scrollIntoView({block: 'center'})"
  browser.execute_script(script, place)
  wait_for(browser, "return document.querySelector('[id^=map-] .hm')")
  cells = place.find_element("css selector", ".hm")
  ActionChains(browser).move_to_element_with_offset(cells, -150, 0).perform()
  hovered = wait_for(
    browser,
    "return document.querySelector('[id^=map-] .hoverlayer').textContent",
  )
  assert "→" in hovered
  shown = (
    "return document.querySelector('[id^=map-]').data[0].text.flat().join()"
  )
  last = browser.execute_script(shown)
  rail = place.find_element("css selector", ".slider-rail-touch-rect")
  start = 8 - rail.rect["width"] / 2
  ActionChains(browser).move_to_element_with_offset(
    rail, start, 0
  ).click().perform()
  assert wait_for(browser, f"{shown} != {last!r} && {shown[7:]}") != last
  menu = browser.find_element(
    "css selector", "[id^=channels-] .updatemenu-header"
  )
  browser.execute_script(script, menu)
  ActionChains(browser).click(menu).perform()
  choices = ".updatemenu-dropdown-button"
  wait_for(browser, f"return document.querySelector('{choices}')")
  buttons = browser.find_elements("css selector", choices)
  ActionChains(browser).click(buttons[1]).perform()
  wait_for(
    browser,
    "return document.querySelector('[id^=channels-]').data[1].visible",
  )
  closed = browser.find_element("css selector", "details.run:not([open])")
  browser.execute_script(script, closed)
  closed.find_element("tag name", "summary").click()
  wait_for(
    browser,
    "return document.querySelectorAll('[id^=map-] .main-svg').length > 3",
  )
  assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_wide_and_narrow(browser, page, width, scheme):
  show(browser, page, width, scheme)
  overflow = "return document.documentElement.scrollWidth - innerWidth"
  assert browser.execute_script(overflow) <= 0
  colors = browser.execute_script(
    "const css = getComputedStyle(document.body);"
    "const text = document.querySelector('.xtick text');"
    "return [css.backgroundColor, css.color, getComputedStyle(text).fill]"
  )
  brightness = [
    sum(map(int, color.strip("rgba()").split(",")[:3])) for color in colors
  ]
  dark = scheme == "dark"
  assert (brightness[0] < 150) == dark
  assert (brightness[1] > 400) == dark
  assert (brightness[2] > 400) == dark


def test_the_page_needs_no_network(page):
  text = pathlib.Path(page).read_text()
  own = text.partition("<script>")[0] + text.rpartition("<script>")[2]
  assert "http://" not in own
  assert "https://" not in own
