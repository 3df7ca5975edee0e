"""The retrofit: state, optimizer, train step, stages, checkpoints and metrics."""
