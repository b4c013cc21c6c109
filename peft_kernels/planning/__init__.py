"""What a training step would need, found out without the weights and without computing: see `memory.py`."""
