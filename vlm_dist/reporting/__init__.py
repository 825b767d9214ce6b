"""Pages about runs, made from the files in their directories alone."""
