"""The retrofit: state, optimizer, train step, stages and metrics."""
