"""From a trained model to a folder that others read, with its card."""
