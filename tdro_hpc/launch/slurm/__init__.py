"""A stage as a job of Slurm: its script, its submission, and the words of a refusal."""
