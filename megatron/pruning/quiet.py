"""Keeps Megatron's import quiet about libraries that this project does without."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# What megatron-core says, module by module, where TransformerEngine and apex are not installed ...
_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"Apex is not installed\. Falling back to",
    r"Only transformer-engine>=.* supports MoE experts, but your version is 0\.0\.0",
)
# ... and what torch says where there is a CUDA toolkit but no GPU.
_LOGGER, _RECORD = "torch.utils.cpp_extension", "No CUDA runtime is found"


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences exactly these complaints, and only inside of the `with`."""
    logger = logging.getLogger(_LOGGER)
    logger.addFilter(_is_wanted)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message, UserWarning)
            yield
    finally:
        logger.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_RECORD)
