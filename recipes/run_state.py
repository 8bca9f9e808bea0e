"""The run folder, for your own scripts: `from run_state import open_folder`."""

from common.run_state import Position, open_folder, save_checkpoint

__all__ = ["Position", "open_folder", "save_checkpoint"]
