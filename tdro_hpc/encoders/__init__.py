"""Text to vectors. Import from the files: `backbone` makes encoders, `tokenization` turns texts into tokens.

Nothing is imported here, so that a process that only tokenises loads no model code.
"""
