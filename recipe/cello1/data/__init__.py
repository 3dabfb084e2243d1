"""The parts of ``python -m recipe.cello1 prepare``, each with one purpose.

======================  ================================================================================
``store``               one h5ad or zarr file: its tables, and where its matrix lies
``matrix``              rows of a stored matrix, chosen ones or all, in blocks of bounded size
``vectors``             the stored arrays that a sparse matrix is made of
``gene_filters``        gene names: symbols, excluded genes
``selection``           which genes of a cell are listed (top k)
``compiled``            how the two before are made fast
``choice``              which cells make puzzles, from the metadata alone
``settings``            what decides the puzzles of a file
``context_table``       the user's table of context fields
``extract``             one file to puzzles: all of the above put together
``parallel``            the same function over many files: processes or a Ray cluster
``parts``               the result of each file, saved, so that a run can be resumed
``imports``             puzzles that others made: Hub, JSON, JSONL, parquet
``identity``            when two cells, donors or puzzles are the same
``splits``              train and test sets without leaks, stratified by the number of cells
``sides``               which side each puzzle goes to
``audit``               what train and test share
``build``               puzzles to a data set: split, merged and per-file JSON, parquet, manifest
``options``             the options of the command
``outputs``             long lists written to disk, hashes, remote copy
======================  ================================================================================
"""
