"""Attention, and the rotary embedding."""

from transformer_engine.pytorch.attention import rope  # noqa: F401
