"""The paper as pure functions, without Flax, files or processes."""
