"""Keep Megatron quiet about libraries that this project does without, and about what only its authors can change."""

import contextlib
import logging
import warnings
from collections.abc import Iterator

# megatron-core says the first three, module by module, where TransformerEngine and apex are not installed, and the rest
# where torchrun did not start the process or the model's configuration is built in code.
_WARNINGS = (
    r"Transformer Engine and Apex are not installed\. Falling back to",
    r"Apex is not installed\. Falling back to",
    r"Only transformer-engine>=.* supports MoE experts, but your version is 0\.0\.0",
    r"Could not determine rank from torch\.distributed",
    r"full scope is deprecated",
)
# What each logger says where there is a CUDA toolkit but no GPU, and when a GPTModel is built.
_RECORDS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
}


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence exactly these complaints, and only inside of the `with`."""
    loggers = [logging.getLogger(name) for name in _RECORDS]
    for logger in loggers:
        logger.addFilter(_is_wanted)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message, UserWarning)
            # Of a string in its source, wherever that must be compiled: without files of bytecode, at every start.
            warnings.filterwarnings("ignore", r"invalid escape sequence", SyntaxWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_RECORDS[record.name])
