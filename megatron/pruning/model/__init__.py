"""What a Llama is: its axes, its weights, its config in both spellings, its layouts, and the face of a checkpoint."""
