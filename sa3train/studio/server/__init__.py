"""Shared by all pages of the studio: workspace, access control, processes, jobs and widgets."""
