"""Our checkpoints on disk: where they lie, what is in them, and opening a model."""
