"""Declare a step to Kubeflow as a lightweight component in the project's image."""

from __future__ import annotations

import functools

from kfp import dsl

from canvastune import __version__

# The pipeline's parameter `pipeline_image` replaces it.
IMAGE = f"canvastune/pipeline:{__version__}"

component = functools.partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
