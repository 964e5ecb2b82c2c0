"""What slurm/testcluster is made of: settings, install, files, daemons, verbs. Standard library only."""
