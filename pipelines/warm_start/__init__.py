"""Steps of a local run without the seconds that their imports take.

A step of the pipeline is a separate process, as is each rank, and most of a short one is spent on
importing PyTorch, transformers and MLflow. `warm_processes` starts two servers that import them
once, one of them without PyTorch, which most of the first steps do not need. Where the run then
starts `python3 -m STEP`, a small client is found in its place, which asks for a fork of a server.
The fork has its own id, signals, exit code, streams and environment, as a new interpreter would
have; a step that crashes takes nothing with it.
"""

from pipelines.warm_start.start import search_path, server_ids, step_variables, warm_processes

__all__ = ["search_path", "server_ids", "step_variables", "warm_processes"]
