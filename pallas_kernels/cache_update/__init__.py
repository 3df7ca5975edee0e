"""A token for all rows of a layer of a merged cache: appended, or merged into the open slot."""
