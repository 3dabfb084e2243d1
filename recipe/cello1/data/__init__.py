"""Expression files or published puzzles to train and test sets."""
