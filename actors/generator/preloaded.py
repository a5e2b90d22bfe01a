"""What the process imports that engines on CPUs are forked from; `engine_process` starts it."""

import gc

from raylign.boundary.imports import lean_imports

with lean_imports():
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import actors.weight_sync.vllm_worker  # noqa: F401

# An engine that ends thaws all objects and looks at them twice, for memory that is free a moment later anyway.
gc.unfreeze = lambda: None
