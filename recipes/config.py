"""The configuration of a run, for your own scripts: `from config import load_config`."""

from common.config import ConfigError, RunError, all_keys, load_config, to_yaml

__all__ = ["ConfigError", "RunError", "all_keys", "load_config", "to_yaml"]
