"""The method on plain values: which puzzles are asked, and what their answers add up to. No AnnData here."""
