"""Structured pruning of Llama checkpoints under tensor and pipeline parallelism."""

__version__ = "0.2.0"
