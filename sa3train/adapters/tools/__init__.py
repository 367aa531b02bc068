"""Work on adapter files: inspect, diff, convert, merge, extract, resize, scale."""
