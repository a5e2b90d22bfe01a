"""What a policy or reward model is worth: generated answers, held-out rows, calibration."""
