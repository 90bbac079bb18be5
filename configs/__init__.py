"""Recipes: one file each, `get_config(size=None) -> ml_collections.ConfigDict`, tiny without a size."""
