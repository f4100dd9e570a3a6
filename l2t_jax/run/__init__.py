"""From an experiment to a trained target."""
