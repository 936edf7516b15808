"""GVPO on PyTorch Lightning."""
