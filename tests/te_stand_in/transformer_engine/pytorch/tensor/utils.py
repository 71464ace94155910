"""Of tensors of low precision."""

cast_master_weights_to_fp8 = replace_raw_data = None
