"""The record of a run: a durable journal, and an MLflow feed that follows it."""

import os

REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
"""Environment variable with MLflow's limit to a request, in whole seconds."""

# Read by mlflow when it is imported or called, so they stand before any module here imports it; the user's own win.
# The feed retries by itself: one quick attempt per call tells it of an outage soonest.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault(REQUEST_TIMEOUT, "20")
# Each step of a redirect would have the whole time again.
os.environ.setdefault("MLFLOW_ALLOW_HTTP_REDIRECTS", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
