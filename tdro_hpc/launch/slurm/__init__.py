"""Jobs of Slurm: what is asked of it, what it answers, and the code that its jobs run."""
