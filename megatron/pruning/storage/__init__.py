"""Bytes and files: lazy tensors, the files that hold them, directories that appear whole or not at all."""
