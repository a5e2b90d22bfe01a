"""A run's policy as a folder that transformers, vLLM and the hub read."""

import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from raylign.config import RunConfig
from raylign.errors import ConfigError
from raylign.export import ADAPTER_CONFIG, export_model
from raylign.model_card import FRAMEWORKS, ModelFacts, framework_versions
from raylign.models import resolve_model
from raylign.records import RoundReport
from raylign.rundir import RunDirectory, open_run
from raylign.tracking.journal import JOURNAL_NAME, read_events
