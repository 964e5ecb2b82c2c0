"""Text to vectors. Import from the files: `backbone` (encoders), `tokenization` (texts to tokens), `tiny` (backbones made
on the spot).

Nothing is imported here, so that a process that only tokenises loads no model code.
"""
