"""What a run left on disk in; plots and one HTML page out. Computes nothing that a stage did not write."""
