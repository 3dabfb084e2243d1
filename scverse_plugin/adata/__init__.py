"""What reads an AnnData object and what writes into one. Each module turns one part of it into plain values."""
