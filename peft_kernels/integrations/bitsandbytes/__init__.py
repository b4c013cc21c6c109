"""bitsandbytes' layers, fused."""
