"""Trainer weights to generators: transports, the publish sequence and the canary that verifies every push."""
