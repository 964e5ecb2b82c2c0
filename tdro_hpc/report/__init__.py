"""What a run left on disk in; plots, a page, a model on the hub out. Computes nothing that a stage did not write."""
