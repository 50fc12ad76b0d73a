"""A site that is one of several (``make site-version``) has a choice of versions; one that opens from the disk cannot look for others."""

from __future__ import annotations

import os

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    if "SITE_VERSIONS" in os.environ:
        config.extra["version"] = {"provider": os.environ["SITE_VERSIONS"], "default": "latest"}
    return config
