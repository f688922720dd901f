"""What fewstep is timed on, against whom, and how the README's table comes from it."""
