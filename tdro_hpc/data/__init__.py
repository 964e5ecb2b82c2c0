"""Task files in, records and tokenised batches out. Rows stay on disk."""
