"""Routing as pure functions: scores -> assignment, placement, balancing losses."""
