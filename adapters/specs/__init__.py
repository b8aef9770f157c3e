"""Torch-free descriptions of the methods, one file a family; decompft.adapters.spec joins them."""
