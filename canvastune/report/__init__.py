"""The report of a run: a self-contained HTML page, its charts as PNG, and the figures of the run."""
