"""How every step is declared to Kubeflow: a lightweight component in the project's own image, with nothing installed at run time."""

from __future__ import annotations

import functools

from kfp import dsl

from canvastune import __version__

IMAGE = f"canvastune/pipeline:{__version__}"  # the pipeline's parameter `pipeline_image` replaces it

component = functools.partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
