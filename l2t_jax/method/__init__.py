"""The paper as pure functions: no Flax, no files, no processes."""
