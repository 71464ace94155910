"""A checkpoint as transformers' own model and tokenizer, made from what this project has read and checked.

transformers is never given a checkpoint's own directory: its config.json may name code to run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.pruning.formats.huggingface import CONFIG_FILE
from megatron.pruning.model.checkpoint import Checkpoint
from megatron.pruning.model.hf_config import config_to_hf, hf_export_problem
from megatron.pruning.storage.dtypes import TORCH_NAMES
from megatron.pruning.storage.small_files import as_json
from megatron.pruning.storage.views import cast, read_all
from megatron.pruning.training.tokenizer import folder_of

if TYPE_CHECKING:  # torch and transformers take seconds, and who has text in tokens needs neither
    from transformers import PreTrainedModel


def build(checkpoint: Checkpoint, dtype: str, device: str) -> "PreTrainedModel":
    """Return the checkpoint as a transformers model in eval mode. Raises ValueError for what transformers has not."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if problem := hf_export_problem(checkpoint.config):
        raise ValueError(f"{checkpoint.path}: {problem}")
    config = AutoConfig.for_model(**config_to_hf(checkpoint.config, dtype))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = {}
    for weight, layer, view in checkpoint.weights():
        bits = torch.from_numpy(read_all(cast(view, dtype)))
        # One weight after the other: the machine's memory need not hold the model, or one for each of its GPUs.
        state[weight.hf_key(layer)] = bits.view(getattr(torch, TORCH_NAMES[dtype])).to(device)
    if checkpoint.config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return model.to(device).eval()


def tokenizer_of(checkpoint: Checkpoint) -> Any:
    """Return transformers' tokenizer of a checkpoint, read from the files that go with it and nothing else.

    Raises ValueError when transformers can make none of them.
    """
    config = {CONFIG_FILE: as_json(config_to_hf(checkpoint.config, checkpoint.dtype))}
    return tokenizer_in(checkpoint.carried_files() | config, checkpoint.tokenizer_folder)


def tokenizer_in(files: Mapping[str, bytes], where: Path | str) -> Any:
    """Return transformers' tokenizer of some files, by name, from `where`. Raises ValueError when they make none."""
    from transformers import AutoTokenizer

    with folder_of(files) as folder:
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"{where} holds no tokenizer that transformers can read ({reason})") from error
