"""Reader of Taskonomy: its files, tasks and official splits."""
