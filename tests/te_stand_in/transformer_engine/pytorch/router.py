"""The router of mixtures of experts, which a Llama has not."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
