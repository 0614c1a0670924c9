"""A run as a page to look at: its values as JSON, and the one HTML file that shows them."""
