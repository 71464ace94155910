"""A stand-in for TransformerEngine on a CPU: its names as of 2.8. In fp8 it computes as without.

What is the same as there: linears that own the norm before them, an extra state of every module, tensor and sequence
parallelism, and an Adam that counts steps in its groups. What it computes is torch's, in the dtype of the weights.
"""

from transformer_engine import common, pytorch  # noqa: F401 - as there, `transformer_engine.pytorch` needs no import

__version__ = "2.8.0"
