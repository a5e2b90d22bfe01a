"""What `raylign doctor` looks at. Light to import: the libraries it judges may be broken."""
