"""The examples learn what they say that they learn."""

from examples import noisy_labels


def test_noisy_labels():
  results = noisy_labels.main()
  assert results["accuracy_learned"] > results["accuracy_equal"] + 0.02
  assert results["weight_right"] > results["weight_wrong"] + 0.2
