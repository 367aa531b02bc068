"""What all pages of the studio share: workspace, processes, jobs, widgets, commands."""
