"""Steps of a local run without the seconds that their imports take.

A step of the pipeline is a separate process, as is each rank, and most of a short one is spent on
importing PyTorch, transformers and MLflow. `warm_processes` starts a server that imports them once.
Where the run then starts `python3 -m STEP`, a small client is found in its place, which asks the
server for a fork of itself. The fork has its own id, signals, exit code, streams and environment,
as a new interpreter would have; a step that crashes takes nothing with it.
"""

from pipelines.warm_start.start import search_path, server_id, step_variables, warm_processes

__all__ = ["search_path", "server_id", "step_variables", "warm_processes"]
