"""Slurm: render a job script."""
