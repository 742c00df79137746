"""Explanations as a web page and as one sheet of images; HTML is escaped here."""
