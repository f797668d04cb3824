"""The only package that knows DeepSpeed: prepared rows in, a standard checkpoint directory out."""
