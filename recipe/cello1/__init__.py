"""Cell-o1: cell type annotation as a puzzle of N cells and N types, with reasoning."""
