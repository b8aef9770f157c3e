"""Recipes shipped with decompft; data only."""
