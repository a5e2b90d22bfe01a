"""What people read of a run: console, tables, notes, summaries."""
