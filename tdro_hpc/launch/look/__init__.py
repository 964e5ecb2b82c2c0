"""What a person sees: plans, bars, logs, the status table."""
