"""Training: runner, loop, checkpoints, optimizer, distributed runs."""
