"""From results to what is read: page, Markdown, LaTeX, charts, the terminal's table."""
