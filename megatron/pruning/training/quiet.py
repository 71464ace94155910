"""Keep Megatron quiet about libraries that this project does without, and about what only its authors can change."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import re
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


OLDEST = (0, 19)  # the Megatron whose training loop, models and formats the project knows


def require_megatron() -> None:
    """End the program with a sentence where megatron-core is not there or is older than `OLDEST`."""
    needs = f"megatron-core {'.'.join(map(str, OLDEST))} or newer is needed to train, score and reconstruct"
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("megatron.core") is None:
            raise SystemExit(f"error: {needs}, and none is installed: pip install 'megatron-core[training]'") from None
        return  # from a directory of sources, which says no version
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        raise SystemExit(f"error: {needs}, and {version} is installed: pip install -U 'megatron-core[training]'")


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Import Megatron in this `with`: it must be one that is known, and exactly these complaints are not heard."""
    require_megatron()
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
