"""PEFT's layers and models, fused."""
