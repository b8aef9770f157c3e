"""Parallel runtimes: one small Engine protocol, one file each."""
