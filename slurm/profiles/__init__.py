"""Examples of Slurm sites; data only. Copy one, and change what differs."""
