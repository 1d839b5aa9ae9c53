"""Results of a search as lines in the terminal, a table, figures and a page. It reads the search's files, not a live search."""
