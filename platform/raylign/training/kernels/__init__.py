"""The expensive operations of a forward and backward pass, a file for each."""
