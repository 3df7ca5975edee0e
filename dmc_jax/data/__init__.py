"""Text to batches: `corpus` -> `tokenizer` -> `prepare` -> `prepared` (on disk) -> `loader`.

Nothing is imported here: tokenising workers import this package and must stay light.
"""
