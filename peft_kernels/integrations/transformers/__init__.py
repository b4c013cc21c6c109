"""transformers' layers and models, fused."""
