"""What a search found: lines in the terminal, a table, figures, a page. Reads the search's files, never a live search."""
