"""GPU tests run the integration fixtures; without a CUDA device they are skipped, never failed."""

import pytest
import torch

from tests.integration.conftest import resources, smollm2

__all__ = ["resources", "smollm2"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
