"""Adapters: maths on tensors. Importing this package imports nothing, so that spec.py stays torch-free."""
