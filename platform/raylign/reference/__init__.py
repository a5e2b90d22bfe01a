"""What log-ratios and KL are measured against."""
