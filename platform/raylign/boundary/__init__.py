"""What crosses the program's boundary: requests to servers that may answer anything, and secrets."""
