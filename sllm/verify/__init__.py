"""What must always hold, one file for each subject."""
