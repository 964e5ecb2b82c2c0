"""Ranks and collectives, and the engine that wraps an encoder for training."""
