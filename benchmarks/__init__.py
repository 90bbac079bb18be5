"""Measurements of what effjax and its kernels claim; each prints a table and writes JSON."""
