"""Detection on many images and videos: which files are meant, how they pass through the network, and what is written."""
