"""SLURM: what launch/slurm.py submits, what each task of the job does, and how the job comes back by itself."""
