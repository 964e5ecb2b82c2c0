"""A stage as processes on this machine: started, supervised, asked to stop."""
