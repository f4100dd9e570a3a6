"""The examples learn what they say that they learn."""

import ast

import nbclient
import nbformat
import pytest

from configs import digits, digits_source
from examples import noisy_labels, regularization, tasks
from tests.support import small_runs

pytestmark = pytest.mark.long


def test_noisy_labels():
  results = noisy_labels.main()
  assert results["accuracy_learned"] > results["accuracy_equal"] + 0.02
  assert results["weight_right"] > results["weight_wrong"] + 0.2


def test_regularization():
  results = regularization.main()
  assert results["learned"] > results["cross_validated"] + 0.01


def test_a_transformer_teaches_a_convnet(tmp_path):
  """Tokens against maps, Linen against NNX, as examples/networks.py says."""
  source_config = digits_source.get_config()
  source_config.target.model = "examples.networks:vit"
  source_config.optimizer.learning_rate = 0.05
  source_config.epochs = 7
  source = small_runs.train(source_config, tmp_path / "vit")
  assert source["test_accuracy"] > 0.3
  config = digits.get_config()
  config.source.weights = str(tmp_path / "vit" / "target.safetensors")
  config.source.taps = ("block_[13]",)
  config.target.model = "examples.networks:convnext_nnx"
  config.bilevel.num_inner_steps = 1
  config.optimizer.learning_rate = 0.05
  config.transfer.beta = 0.02
  config.epochs = 20
  summary = small_runs.train(config, tmp_path / "convnext")
  assert summary["test_accuracy"] > 0.3
  losses = [
    record["train_matching_loss"]
    for record in small_runs.records(tmp_path / "convnext", "epoch")
  ]
  assert losses[-1] < 0.8 * max(losses)


@pytest.mark.parametrize(
  ("task", "method", "guess"),
  [
    # No digit is there; the middle of -1 and 1; ink everywhere.
    ("PRESENCE", "scratch", 0.81),
    ("ANGLE", "fm_all_to_all", -0.5),
    ("INK", "fm_all_to_all", 0.3),
  ],
)
def test_tasks(task, method, guess, source, tmp_path):
  config = tasks.config_of(task, tmp_path, source, method, epochs=8)
  config.bilevel.num_inner_steps = 1
  summary = small_runs.train(config, tmp_path / "run")
  assert summary["test_accuracy"] > guess + 0.05


def test_notebook():
  """Every cell runs; it draws the map and the target has learned."""
  notebook = nbformat.read(small_runs.ROOT / "examples/notebook.ipynb", 4)
  nbclient.NotebookClient(
    notebook, timeout=600, resources={"metadata": {"path": small_runs.ROOT}}
  ).execute()
  *_, targets, drawn, predicted = (
    cell.outputs[-1]["data"] for cell in notebook.cells if cell.get("outputs")
  )
  assert min(ast.literal_eval(targets["text/plain"]).values()) > 0.4
  assert "image/png" in drawn
  assert "array" in predicted["text/plain"]
