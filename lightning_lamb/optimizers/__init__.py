"""Optimizers with layer-wise normalisation."""
