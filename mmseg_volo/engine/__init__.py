"""Training: runner, loop, checkpoints, optimizer, several processes."""
