"""YAML and `key=value` in, one frozen Config out. Never imports torch."""
