"""Decision Transformer, in one file: being written by a second helper."""
