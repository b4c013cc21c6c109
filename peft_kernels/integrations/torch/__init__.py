"""torch.nn's layers, fused."""
