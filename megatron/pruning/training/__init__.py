"""Everything that runs a model: the only package that imports torch and Megatron when it is imported."""
