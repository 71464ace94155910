"""The entry scripts beside prune_llama.py and pretrain_gpt.py; a wheel has them as megatron.pruning.tools."""
