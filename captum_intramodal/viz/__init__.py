"""HTML pages and plots: an explanation as a web page and as one overview image."""
